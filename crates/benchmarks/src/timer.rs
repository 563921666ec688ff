//! The time that a kernel takes on the device.
//!
//! On CUDA a window is two events in the stream around some calls, read on the device's own clock
//! (`Client::profile_start`). Launching costs the host more than a small kernel runs, so a window would
//! measure the host; therefore a kernel that does nothing but wait goes first, long enough for all of the
//! window's calls to be queued behind it. Then the device runs them back to back: what is measured is the
//! kernel and the gap to the next one, as in a busy stream. Events are stamped to 0.5 us; a window lasts
//! 2 ms, so that is 0.03 %.
//!
//! A call that waits for the device itself can't be queued ahead. It is timed alone, the host's part
//! included, and marked.
//!
//! Other runtimes stamp nothing: there a window is the host's time for many calls and one wait.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use cubecl::client::Client;
use cubecl::future::block_on;
use cubecl::server::Handle;
use cuda_source::{Arguments, Source};

use crate::case::Run;

/// Windows; their median counts.
const WINDOWS: usize = 15;
/// Windows in which the host came too late, until what is measured is marked.
const LATE: usize = 30;
/// Seconds that a window should last.
const WINDOW: f64 = 2e-3;
const MAX_CALLS: usize = 64;
/// Seconds that the waiting kernel may take at most.
const MAX_WAIT: f64 = 0.05;

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// Median of the windows, per call.
    pub seconds: f64,
    /// Half of the windows lie within this share of the median.
    pub spread: f64,
    /// False when calls wait for the device: the host's part is in the time.
    pub queued: bool,
}

/// Times calls on one device.
pub(crate) struct Timer {
    client: Client,
    /// Scratch of the waiting kernel; `None` where there is no CUDA.
    waiting: Option<(Source, Handle)>,
}

impl Timer {
    pub(crate) fn new(client: &Client) -> Self {
        let waiting = cuda_source::device(client)
            .map(|_| (Source::new("wait", 1, include_str!("wait.cu")), client.create_from_slice(&[0; 8])));
        Self { client: client.clone(), waiting }
    }

    /// The median time of a call.
    pub(crate) fn time(&self, run: &mut Run) -> Result<Timing> {
        // The first calls compile; failures of a launch lie on its outputs.
        let mut next = 0;
        let mut call = |calls: usize| -> Result<()> {
            for _ in 0..calls {
                (run.call)(next)?;
                next += 1;
            }
            Ok(())
        };
        call(3)?;
        block_on(self.client.sync_buffers(&run.outputs)).context("the kernel does not run")?;

        let mut wait = 2e-4;
        let first = self.window(&mut call, 1, wait)?;
        let mut calls = ((WINDOW / first.seconds.max(1e-7)) as usize).clamp(1, MAX_CALLS);
        let mut queued = false;
        for _ in 0..4 {
            let window = self.window(&mut call, calls, wait)?;
            queued = window.queued;
            if queued || wait >= MAX_WAIT {
                break;
            }
            wait = (1.5 * window.host).clamp(2.0 * wait, MAX_WAIT);
        }
        if !queued && self.waiting.is_some() {
            (calls, wait) = (1, 0.0);
        }
        let mut seconds = Vec::with_capacity(WINDOWS);
        let mut late = 0;
        while seconds.len() < WINDOWS {
            let window = self.window(&mut call, calls, wait)?;
            if !queued || window.queued {
                seconds.push(window.seconds);
                continue;
            }
            // The host was held up, and the device waited for it: that is no time of the kernel's. A host that stays so slow
            // is told instead.
            late += 1;
            wait = (1.5 * window.host).clamp(wait, MAX_WAIT);
            if late == LATE {
                queued = false;
            }
        }
        block_on(self.client.sync_buffers(&run.outputs)).context("the kernel does not run")?;
        seconds.sort_by(f64::total_cmp);
        let median = seconds[WINDOWS / 2];
        let spread = (seconds[WINDOWS * 3 / 4] - seconds[WINDOWS / 4]) / 2.0 / median;
        Ok(Timing { seconds: median, spread, queued })
    }

    fn window(&self, call: &mut dyn FnMut(usize) -> Result<()>, calls: usize, wait: f64) -> Result<Window> {
        let Some((source, scratch)) = &self.waiting else { return self.host_window(call, calls) };
        let start = Instant::now();
        if wait > 0.0 {
            let arguments = Arguments::new().write(scratch).params((wait * 1e9) as u64);
            cuda_source::launch(&self.client, source, (1, 1, 1), arguments)?;
        }
        let window = self.client.profile_start()?;
        if let Err(error) = call(calls) {
            self.client.profile_abandon(window);
            return Err(error);
        }
        // Returns when everything before it was handed to the driver.
        let duration = self.client.profile_end(window)?;
        let host = start.elapsed().as_secs_f64();
        let ticks = block_on(duration.resolve()).context("the device measured nothing")?;
        let seconds = ticks.duration().as_secs_f64() / calls as f64;
        // CubeCL reports an hour for a window that it can't read.
        if !(0.0..1000.0).contains(&seconds) {
            bail!("the device's clock can't be read");
        }
        Ok(Window { seconds, host, queued: host < wait })
    }

    fn host_window(&self, call: &mut dyn FnMut(usize) -> Result<()>, calls: usize) -> Result<Window> {
        block_on(self.client.sync())?;
        let start = Instant::now();
        call(calls)?;
        block_on(self.client.sync())?;
        let host = start.elapsed().as_secs_f64();
        Ok(Window { seconds: host / calls as f64, host, queued: true })
    }
}

struct Window {
    /// Per call.
    seconds: f64,
    /// From the first launch until the driver had them all.
    host: f64,
    /// The device was still waiting then.
    queued: bool,
}
