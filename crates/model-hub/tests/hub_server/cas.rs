//! A Xet storage on this machine: Xet's own, for tests, in memory.

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Once};

use tokio::runtime::Runtime;
use xet_client::cas_client::simulation::LocalTestServerBuilder;
use xet_client::cas_client::{DeletionControlableClient, DirectAccessClient, MemoryClient};
use xet_runtime::core::XetContext;

/// The storage and what runs it.
pub struct Cas {
    runtime: Runtime,
    client: Arc<MemoryClient>,
    endpoint: String,
}

impl std::fmt::Debug for Cas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.endpoint)
    }
}

impl Cas {
    /// Starts one.
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (client, server) = runtime.block_on(async {
            let client = MemoryClient::new(XetContext::default().unwrap());
            let server = LocalTestServerBuilder::new().with_client(client.clone()).start().await;
            (client, server)
        });
        let endpoint = server.http_endpoint().to_owned();
        // It stops when it is dropped.
        std::mem::forget(server);
        Self { runtime, client, endpoint }
    }

    /// Host and port.
    pub fn address(&self) -> String {
        self.endpoint.trim_start_matches("http://").to_owned()
    }

    /// Every file that it holds: its name there, and its content.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.runtime.block_on(async {
            let mut files = Vec::new();
            for (name, _) in self.client.list_file_shard_entries().await.unwrap() {
                let content = self.client.get_file_data(&name, None).await.unwrap();
                files.push((name.hex(), content.to_vec()));
            }
            files
        })
    }
}

/// Passes one request on to the storage at `address`, and the answer back. `head` lacks its last empty line.
pub fn pass_on(head: &str, mut rest: BufReader<TcpStream>, back: &TcpStream, address: &str) -> Option<()> {
    let mut there = TcpStream::connect(address).ok()?;
    there.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).ok()?;
    let mut to = there.try_clone().ok()?;
    // It ends when one of the two hangs up.
    std::thread::spawn(move || {
        let mut buffer = [0; 1 << 14];
        while let Ok(n @ 1..) = rest.read(&mut buffer) {
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
    });
    std::io::copy(&mut there, &mut &*back).ok()?;
    back.shutdown(std::net::Shutdown::Both).ok()
}

/// Xet keeps a cache of what it knows of storages, by their address: no other process may have used it.
pub fn use_a_cache_of_this_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let folder = format!("{}/xet-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
        // SAFETY: the standard library takes turns with itself, and nothing else in a test reads variables.
        unsafe { std::env::set_var("HF_XET_CACHE", folder) };
    });
}
