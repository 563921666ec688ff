//! A look at one step: how long the host takes to queue it, and what it launches.
//!
//! Both cost time, so that a step that is looked at is not one that is timed. Launches are CubeCL's, our own
//! included, by its launch observer; the end of queueing is where the engine's `read_back` span begins.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn_qlora::qlora_train::profile::with_subscriber;
use cubecl::client::Client;
use cubecl::logging::{LaunchObservation, LaunchObserver};
use tracing::Subscriber;
use tracing::span::Id;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// Launches by kernel.
    pub launches: BTreeMap<&'static str, usize>,
    /// From the step's beginning until the read-back, where everything before it had been handed to the driver.
    pub queueing: Option<Duration>,
}

/// Runs a step and looks at it.
pub(crate) fn at<T>(client: Option<&Client>, step: impl FnOnce() -> T) -> (T, Look) {
    let launches = Arc::new(Launches::default());
    let end: Arc<Mutex<Option<Instant>>> = Arc::default();
    let layer = ReadBack { client: client.cloned(), end: end.clone() };
    let observation = LaunchObservation::new(launches.clone());
    let start = Instant::now();
    let result = with_subscriber(Registry::default().with(layer), step);
    drop(observation);
    let launches = std::mem::take(&mut *launches.0.lock().unwrap_or_else(PoisonError::into_inner));
    let end = *end.lock().unwrap_or_else(PoisonError::into_inner);
    (result, Look { launches, queueing: end.map(|end| end - start) })
}

#[derive(Default)]
struct Launches(Mutex<BTreeMap<&'static str, usize>>);

impl LaunchObserver for Launches {
    fn launched(&self, kernel: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(kernel).or_default() += 1;
    }
}

/// Notes when the read-back begins.
struct ReadBack {
    client: Option<Client>,
    end: Arc<Mutex<Option<Instant>>>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for ReadBack {
    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if context.span(id).is_some_and(|span| span.name() == "read_back") {
            // CubeCL's own thread hands launches to the driver; this waits for it, not for the device. A failure shows
            // in the read-back itself.
            if let Some(client) = &self.client {
                let _ = client.flush();
            }
            *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }
}
