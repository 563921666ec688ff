//! Counters that outlive a launch.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use cubecl::client::Client;
use cubecl::server::Handle;

/// By device, stream and number.
type Kept = HashMap<(u16, u64, usize), Handle>;

/// `len` counters, `u32`, for kernels on the stream of `recent`, a buffer just made: zero between launches, because a
/// kernel that gets them (by [`Arguments::counters`](crate::Arguments::counters)) puts them back.
pub fn counters(client: &Client, recent: &Handle, len: usize) -> Handle {
    static KEPT: LazyLock<Mutex<Kept>> = LazyLock::new(Mutex::default);
    let key = (client.service_id().device.index_id, recent.stream.value, len);
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(counters) = kept.get(&key) {
        return counters.clone();
    }
    let counters = client.create_from_slice(bytemuck::cast_slice(&vec![0_u32; len]));
    // Those for which no memory was left are not kept.
    if client.check([&counters]).is_ok() {
        kept.insert(key, counters.clone());
    }
    counters
}
