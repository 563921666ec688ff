//! Sends what a run tells from a thread of its own, so that no step waits for a server.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

/// How long the end of a run waits for what is still to be sent.
const LAST_WAIT: Duration = Duration::from_secs(30);

/// The way to the thread that sends.
pub(super) struct Courier<Entry> {
    to_worker: Sender<Entry>,
    /// How sending ended.
    from_worker: Receiver<Result<(), String>>,
}

impl<Entry: Send + 'static> Courier<Entry> {
    /// Starts the thread. `work` takes what comes, in its order, until the entry that ends the run, or until nothing can come any more.
    pub(super) fn start(
        name: &str,
        work: impl FnOnce(&Receiver<Entry>) -> Result<(), String> + Send + 'static,
    ) -> Result<Self, String> {
        let ((to_worker, entries), (done, from_worker)) = (mpsc::channel(), mpsc::channel());
        let worker = move || {
            // Whoever would hear of it may be gone.
            let _ = done.send(work(&entries));
        };
        std::thread::Builder::new().name(name.into()).spawn(worker).map_err(|error| error.to_string())?;
        Ok(Self { to_worker, from_worker })
    }

    /// Hands something over.
    pub(super) fn send(&self, entry: Entry) -> Result<(), String> {
        // The worker has ended by an error if it takes nothing more.
        self.to_worker.send(entry).or_else(|_| self.result())
    }

    /// Hands over the last entry, and waits until all is sent.
    pub(super) fn finish(&self, last: Entry) -> Result<(), String> {
        self.send(last)?;
        self.result()
    }

    fn result(&self) -> Result<(), String> {
        match self.from_worker.recv_timeout(LAST_WAIT) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(format!("not all values arrived within {} s", LAST_WAIT.as_secs())),
            Err(RecvTimeoutError::Disconnected) => Err("its thread has ended".into()),
        }
    }
}
