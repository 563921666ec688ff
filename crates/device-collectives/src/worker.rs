//! The thread that queues operations, so that whoever asks for them goes on with other work.
//!
//! Asking CubeCL for an address means to wait until it has come to that, once for each tensor; the thread that computes gradients has
//! no time for it.

use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use burn::backend::StreamId;
use cubecl::client::Client;
use cubecl::server::Handle;

use crate::error::CollectiveError;
use crate::memory::Place;
use crate::nccl::{Comm, Element, Nccl};
use crate::side_stream::SideStream;

/// How long an abort waits for a call that queues operations.
const QUEUEING: Duration = Duration::from_secs(5);

/// An operation that is to be queued.
pub(crate) struct Job {
    /// What was told to the side stream when the operands were complete.
    pub told: u32,
    pub work: Work,
}

pub(crate) enum Work {
    /// Sums in place: buffers of so many f32, of the stream that fills them.
    Sum { buffers: Vec<(Handle, usize)>, stream: StreamId },
    /// A gather of bytes between addresses, and the mark behind it.
    Gather { from: u64, to: u64, bytes: usize, mark: u32 },
}

/// What has become of the jobs.
#[derive(Debug, Default)]
struct Progress {
    /// Jobs that were asked for, and those that are queued or given up.
    asked: u64,
    done: u64,
    /// Sums that are queued since the last wait.
    sums: usize,
    /// Why jobs are given up.
    failure: Option<CollectiveError>,
}

/// What the thread shares with those who ask.
pub(crate) struct Shared {
    pub nccl: Nccl,
    pub client: Client,
    pub side: SideStream,
    /// Null once it is aborted.
    communicator: AtomicPtr<c_void>,
    /// Held while the communicator is used. An abort takes it away from whoever holds this for too long.
    using: Mutex<()>,
    progress: Mutex<Progress>,
    changed: Condvar,
    /// What operations may work on: CubeCL neither gives its memory to others nor moves it before they are waited for. The last field,
    /// so that it goes after the stream.
    under_way: Mutex<Vec<Place>>,
}

impl Shared {
    pub(crate) fn new(nccl: Nccl, client: Client, side: SideStream, communicator: Comm) -> Self {
        Self {
            nccl,
            client,
            side,
            communicator: AtomicPtr::new(communicator),
            using: Mutex::default(),
            progress: Mutex::default(),
            changed: Condvar::new(),
            under_way: Mutex::default(),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a job that is asked for.
    ///
    /// # Errors
    /// Why earlier ones were given up, once; none of them is left then.
    pub(crate) fn asked(&self) -> Result<(), CollectiveError> {
        if self.progress().failure.is_some() {
            self.flush()?;
        }
        self.progress().asked += 1;
        Ok(())
    }

    /// Waits until all jobs are queued.
    ///
    /// # Errors
    /// As [`asked`](Self::asked).
    pub(crate) fn flush(&self) -> Result<(), CollectiveError> {
        let busy = |progress: &mut Progress| progress.done < progress.asked;
        let waited = self.changed.wait_while(self.progress(), busy);
        match waited.unwrap_or_else(PoisonError::into_inner).failure.take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// Sums that are queued since the last [wait](Self::waited).
    pub(crate) fn sums(&self) -> usize {
        self.progress().sums
    }

    /// What was queued is waited for on CubeCL's stream: whatever takes its memory from now on comes after it.
    pub(crate) fn waited(&self) {
        self.progress().sums = 0;
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Queues jobs until nobody can ask for more.
    pub(crate) fn work(self: Arc<Self>, jobs: &Receiver<Job>) {
        /// Nobody waits for a thread that is gone.
        struct Gone<'a>(&'a Shared);

        impl Drop for Gone<'_> {
            fn drop(&mut self) {
                let mut progress = self.0.progress();
                progress.done = u64::MAX;
                progress.failure = Some(CollectiveError::Aborted);
                self.0.changed.notify_all();
            }
        }

        let _gone = Gone(&self);
        for job in jobs {
            let given_up = self.progress().failure.is_some();
            let is_sum = matches!(job.work, Work::Sum { .. });
            let queued = if given_up { Ok(()) } else { self.queue(job) };
            let mut progress = self.progress();
            progress.done += 1;
            match queued {
                Ok(()) => progress.sums += usize::from(is_sum && !given_up),
                Err(error) => progress.failure = Some(error),
            }
            self.changed.notify_all();
        }
    }

    fn queue(&self, Job { told, work }: Job) -> Result<(), CollectiveError> {
        match work {
            Work::Sum { buffers, stream } => {
                let place = |(buffer, count): &(Handle, usize)| Ok((Place::of(&self.client, buffer)?, *count));
                let places =
                    stream.executes(|| buffers.iter().map(place).collect::<Result<Vec<_>, CollectiveError>>())?;
                let (_guard, comm) = self.communicator()?;
                let stream = self.side.after(told)?;
                self.nccl.grouped(|| {
                    places.iter().try_for_each(|(place, count)| {
                        // SAFETY: the memory is the tensors' alone, and stays because they are kept; they are used again
                        // behind a wait.
                        unsafe { self.nccl.sum(place.address(), *count, Element::F32, comm, stream) }
                    })
                })?;
                let places = places.into_iter().map(|(place, _)| place);
                self.under_way.lock().unwrap_or_else(PoisonError::into_inner).extend(places);
                Ok(())
            }
            Work::Gather { from, to, bytes, mark } => {
                let (_guard, comm) = self.communicator()?;
                let stream = self.side.after(told)?;
                // SAFETY: sizes were checked; whoever asked uses the target behind a wait, and keeps both until then.
                unsafe { self.nccl.gather(from, to, bytes, Element::U8, comm, stream) }?;
                self.side.mark(mark)
            }
        }
    }

    /// The communicator, for as long as the guard is held.
    fn communicator(&self) -> Result<(MutexGuard<'_, ()>, Comm), CollectiveError> {
        let guard = self.using.lock().unwrap_or_else(PoisonError::into_inner);
        let comm = self.communicator.load(Ordering::SeqCst);
        if comm.is_null() { Err(CollectiveError::Aborted) } else { Ok((guard, comm)) }
    }

    /// See [`Collectives::problem`](crate::Collectives::problem).
    pub(crate) fn problem(&self) -> Option<CollectiveError> {
        let _guard = self.using.try_lock().ok()?;
        let comm = Some(self.communicator.load(Ordering::SeqCst)).filter(|comm| !comm.is_null())?;
        // SAFETY: it is a communicator as long as the lock is held.
        unsafe { self.nccl.state(comm) }.err()
    }

    /// See [`Collectives::abort`](crate::Collectives::abort).
    pub(crate) fn abort(&self) {
        self.side.break_off();
        let deadline = Instant::now() + QUEUEING;
        let _guard = loop {
            match self.using.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(guard)) => break Some(guard.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                // A call that queues waits for the rank that is gone: NCCL ends it when it learns of the abort.
                Err(TryLockError::WouldBlock) => break None,
            }
        };
        let comm = self.communicator.swap(std::ptr::null_mut(), Ordering::SeqCst);
        if comm.is_null() || self.side.stream().is_err() {
            return;
        }
        // SAFETY: nobody has aborted it before. Whoever may use it now is ended by this.
        if let Err(error) = unsafe { self.nccl.abort(comm) } {
            tracing::warn!(%error, "NCCL's communicator does not end in order");
        }
    }
}
