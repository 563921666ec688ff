//! Where the time of a step goes: host spans and device kernels of a few steps, as a trace for
//! [Perfetto](https://ui.perfetto.dev) (Chrome's trace event format) and as tables.
//!
//! The host's side are `tracing` spans of this workspace's crates (`step`, `micro_step`, `embed`, `block`,
//! `block_backward`, `gradient`, `head_and_loss`, `optimizer`, `read_back`, `data`, ...), which cost one load of an
//! atomic each while no profile is taken. The device's side are CubeCL's launches, by its launch observer: two events
//! around each in the stream, read after the last profiled step, so that kernels run one behind the other as ever and
//! carry the place in the step that launched them. On the CPU there are host spans alone.
//!
//! A launch that is measured costs the host a round trip to CubeCL's own thread. Therefore a few steps are profiled, not a
//! run; in these, kernels take their usual time, while gaps between them and host spans are longer than otherwise.

mod layer;
mod summary;
mod trace;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use cubecl::future::block_on;
use cubecl::logging::{LaunchObservation, LaunchObserver, ProfileDuration, TimingMethod, TimingRequest};
use tracing::subscriber::{self, NoSubscriber};
use tracing::{Dispatch, Subscriber};

use crate::error::TrainError;

pub use layer::ProfileLayer;
pub use summary::{KernelTime, PartTime, TraceSummary, short_name};

/// Longer than any device has been on.
const LONG_AGO: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Name of the span that counts as a step.
const STEP: &str = "step";

/// Which steps are profiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Steps before: kernels are compiled in the first, and memory finds its size.
    pub skip: usize,
    /// Steps that are profiled.
    pub steps: usize,
}

/// A recording in progress. [`layer`](Self::layer) goes into the subscriber that is on while steps run;
/// [`finish`](Self::finish) ends it.
#[derive(Debug)]
pub struct Profile {
    recorder: Arc<Recorder>,
}

impl Profile {
    /// Waits for the first step of the window.
    pub fn new(window: Window) -> Self {
        let recorder = Recorder {
            epoch: Instant::now(),
            window,
            state: Mutex::default(),
            stacks: Mutex::default(),
            launches: Arc::default(),
        };
        if window.skip == 0 && window.steps > 0 {
            recorder.begin(&mut recorder.state());
        }
        Self { recorder: Arc::new(recorder) }
    }

    /// What records spans. It is to see no others than [`ProfileLayer::filter`] lets through.
    pub fn layer(&self) -> ProfileLayer {
        ProfileLayer(self.recorder.clone())
    }

    /// Ends the recording and reads the kernels' times, which waits for the device.
    pub fn finish(self) -> Trace {
        let mut state = self.recorder.state();
        self.recorder.end(&mut state);
        let launches = std::mem::take(&mut *lock(&self.recorder.launches.done));
        let (kernels, unmeasured) = read(launches, self.recorder.epoch);
        let spans = std::mem::take(&mut state.spans);
        Trace { spans, kernels, unmeasured, steps: state.profiled }
    }
}

/// Runs `work` under a subscriber of this thread's own, which sees every span of `work`, whatever other threads do.
///
/// While a process has one subscriber, `tracing` asks the thread that enters a span first whether anybody wants it, and
/// keeps the answer for all threads: a step on a thread without a subscriber would switch its spans off for good. With
/// a second one, which wants nothing, it asks them all.
pub fn with_subscriber<T>(subscriber: impl Subscriber + Send + Sync + 'static, work: impl FnOnce() -> T) -> T {
    static SECOND: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::new()));
    LazyLock::force(&SECOND);
    subscriber::with_default(subscriber, work)
}

/// Reads the kernels' times, which waits for the device. Returns how many have none, too.
fn read(launches: Vec<Launch>, epoch: Instant) -> (Vec<Kernel>, usize) {
    let count = launches.len();
    // Far enough back for every clock: differences of instants can't be negative.
    let base = epoch.checked_sub(LONG_AGO).unwrap_or(epoch);
    let measured: Vec<(Launch, Duration, Duration, bool)> = launches
        .into_iter()
        .filter_map(|mut launch| {
            let time = launch.time.take()?;
            let on_device = time.timing_method() == TimingMethod::Device;
            let ticks = block_on(time.resolve())?;
            let (start, end) = (ticks.start_duration_since(base), ticks.end_duration_since(base));
            // CubeCL reports an hour for a window that it can't read.
            (end - start < Duration::from_secs(1000)).then_some((launch, start, end, on_device))
        })
        .collect();
    let nanos = |time: Duration| time.as_nanos() as i128;
    // CUDA's times are placed on the host's clock. Other devices count from a beginning of their own: the kernel that
    // began soonest after its launch then began at once.
    let lag = measured.iter().map(|(launch, start, ..)| nanos(*start) - nanos(launch.issued - base)).min();
    let shift = lag.filter(|lag| !(0..nanos(Duration::from_secs(1))).contains(lag)).unwrap_or(0);
    let moved = |time: Duration| {
        Duration::from_nanos(u64::try_from(nanos(time) - shift - nanos(epoch - base)).unwrap_or_default())
    };
    let kernels: Vec<Kernel> = measured
        .into_iter()
        .map(|(Launch { name, place, .. }, start, end, on_device)| Kernel {
            name,
            place,
            start: moved(start),
            end: moved(end),
            on_device,
        })
        .collect();
    let unmeasured = count - kernels.len();
    (kernels, unmeasured)
}

/// What was recorded.
#[derive(Debug, Default)]
pub struct Trace {
    spans: Vec<Span>,
    kernels: Vec<Kernel>,
    /// Launches without a time.
    unmeasured: usize,
    steps: usize,
}

impl Trace {
    /// Steps that were profiled: fewer than asked for where the run ended before.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Sums by part of the step and by kernel.
    pub fn summary(&self) -> TraceSummary {
        summary::sum_up(self)
    }

    /// Writes Chrome's trace event format, which Perfetto and `chrome://tracing` open.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, path: &Path) -> Result<(), TrainError> {
        Ok(adapter_io::atomic::write_file(path, |file| trace::write(self, file))?)
    }
}

/// A host span that has ended. Times count from the profile's beginning.
#[derive(Debug)]
struct Span {
    /// With its fields: `block 3`.
    label: String,
    place: Arc<str>,
    thread: u64,
    start: Duration,
    end: Duration,
    /// Of which in spans within it.
    inside: Duration,
}

/// A kernel that has run.
#[derive(Debug)]
struct Kernel {
    name: &'static str,
    /// Where in the step it was launched.
    place: Arc<str>,
    start: Duration,
    end: Duration,
    /// False where the runtime has no clock on the device.
    on_device: bool,
}

/// A span that is entered.
#[derive(Debug)]
struct Open {
    label: String,
    place: Arc<str>,
    start: Instant,
    inside: Duration,
}

#[derive(Default, Debug)]
struct State {
    /// Steps that ended.
    steps: usize,
    profiled: usize,
    on: bool,
    observation: Option<LaunchObservation>,
    spans: Vec<Span>,
    threads: HashMap<ThreadId, u64>,
}

/// Spans of each thread that are entered, the outermost first.
type Stacks = HashMap<ThreadId, Vec<Open>>;

#[derive(Debug)]
struct Recorder {
    epoch: Instant,
    window: Window,
    state: Mutex<State>,
    stacks: Mutex<Stacks>,
    launches: Arc<Launches>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn begin(&self, state: &mut State) {
        state.on = true;
        state.observation = Some(LaunchObservation::new(self.launches.clone()));
    }

    fn end(&self, state: &mut State) {
        state.on = false;
        state.observation = None;
    }

    fn enter(&self, name: &'static str, label: String) {
        if !self.state().on {
            return;
        }
        let mut stacks = lock(&self.stacks);
        let stack = stacks.entry(std::thread::current().id()).or_default();
        // Steps and micro-steps say when, not where.
        let place = match stack.last() {
            Some(outer) if !matches!(&*outer.place, STEP | "micro_step") => format!("{} > {name}", outer.place).into(),
            _ => name.into(),
        };
        lock(&self.launches.places).insert(std::thread::current().id(), Arc::clone(&place));
        stack.push(Open { label, place, start: Instant::now(), inside: Duration::ZERO });
    }

    fn exit(&self, name: &'static str) {
        let end = Instant::now();
        let thread = std::thread::current().id();
        let closed = {
            let mut stacks = lock(&self.stacks);
            let Some(stack) = stacks.get_mut(&thread) else { return self.count(name, None) };
            let closed = stack.pop();
            let mut places = lock(&self.launches.places);
            match stack.last_mut() {
                Some(outer) => {
                    outer.inside += closed.as_ref().map_or(Duration::ZERO, |closed| end - closed.start);
                    places.insert(thread, Arc::clone(&outer.place));
                }
                None => {
                    places.remove(&thread);
                }
            }
            closed
        };
        self.count(name, closed.map(|open| (open, end)));
    }

    /// Keeps a span that has ended, and begins or ends the recording after a step.
    fn count(&self, name: &'static str, closed: Option<(Open, Instant)>) {
        let mut state = self.state();
        let whole = closed.is_some();
        if let Some((Open { label, place, start, inside }, end)) = closed
            && state.on
        {
            let next = state.threads.len() as u64 + 1;
            let thread = *state.threads.entry(std::thread::current().id()).or_insert(next);
            let since = |instant: Instant| instant - self.epoch;
            state.spans.push(Span { label, place, thread, start: since(start), end: since(end), inside });
        }
        if name != STEP {
            return;
        }
        state.profiled += usize::from(state.on && whole);
        state.steps += 1;
        let Window { skip, steps } = self.window;
        if state.steps == skip && steps > 0 {
            self.begin(&mut state);
        } else if state.steps == skip + steps {
            self.end(&mut state);
        }
    }
}

/// A launch, its time not read yet.
struct Launch {
    name: &'static str,
    place: Arc<str>,
    issued: Instant,
    time: Option<ProfileDuration>,
}

/// Takes the measurement of every launch.
#[derive(Default)]
struct Launches {
    /// The innermost span of each thread.
    places: Mutex<HashMap<ThreadId, Arc<str>>>,
    done: Mutex<Vec<Launch>>,
}

impl std::fmt::Debug for Launches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Launches").field("done", &lock(&self.done).len()).finish()
    }
}

impl Launches {
    fn push(&self, name: &'static str, issued: Instant, time: Option<ProfileDuration>) {
        let place = lock(&self.places).get(&std::thread::current().id()).cloned();
        let place = place.unwrap_or_else(|| "outside".into());
        lock(&self.done).push(Launch { name, place, issued, time });
    }
}

impl LaunchObserver for Launches {
    fn launched(&self, _: &'static str) {}

    fn timing(&self) -> TimingRequest {
        TimingRequest::Deferred
    }

    fn profiled(&self, kernel: &'static str, profile: ProfileDuration) {
        self.push(kernel, Instant::now(), Some(profile));
    }

    /// Only where CubeCL's own profiling log reads the measurement: its end is now.
    fn timed(&self, kernel: &'static str, duration: Duration, method: TimingMethod) {
        let end = Instant::now();
        let start = end - duration;
        let ticks = cubecl::profile::ProfileTicks::from_start_end(start, end);
        self.push(kernel, start, Some(ProfileDuration::new(Box::pin(async move { Some(ticks) }), method)));
    }
}

#[cfg(test)]
mod tests;
