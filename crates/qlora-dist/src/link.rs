//! The connections of a rank, and the threads behind them: one that reads and one that gives signs of life, for each.
//!
//! Time is counted in waits of [`Shared::tick`] that brought nothing, not by the clock: a process that was stopped with all the others, as
//! schedulers do, finds them as alive as it left them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::DistError;
use crate::wire::{self, Call, Failure, Frame, HEADER, PART};

/// How long a rank that leaves waits for the others to have read what it sent last.
const LINGER: Duration = Duration::from_millis(500);
/// How long a broken connection may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A connection to another rank.
#[derive(Debug)]
pub(crate) struct Link {
    pub rank: usize,
    pub host: String,
    stream: TcpStream,
    /// Held while a frame is written.
    writing: Mutex<()>,
}

/// What has come, and what became of the ranks.
#[derive(Debug, Default)]
struct Inbox {
    /// Messages by link.
    messages: Vec<VecDeque<(Call, Vec<u8>)>>,
    /// Whether a link's rank has left in order.
    left: Vec<bool>,
    /// Whether a link's reader is done.
    closed: Vec<bool>,
    failure: Option<Failure>,
    /// Whether the failure is being told to the others.
    telling: bool,
}

/// What the threads of a group share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub rank: usize,
    pub host: String,
    pub links: Vec<Link>,
    silence: Duration,
    inbox: Mutex<Inbox>,
    changed: Condvar,
    /// When this rank began to leave.
    closing: OnceLock<Instant>,
}

/// Why a connection carries no more.
enum End {
    Closed,
    Silent,
    Broken(io::Error),
    Rubbish(String),
    /// The group ends.
    Stopped,
}

impl Shared {
    /// Links over connections that are open, each to a rank on a host.
    pub fn new(
        rank: usize,
        host: String,
        silence: Duration,
        peers: Vec<(usize, String, TcpStream)>,
    ) -> io::Result<Arc<Self>> {
        let count = peers.len();
        let link = |(rank, host, stream)| Link { rank, host, stream, writing: Mutex::new(()) };
        let inbox = Inbox {
            messages: (0..count).map(|_| VecDeque::new()).collect(),
            left: vec![false; count],
            closed: vec![false; count],
            failure: None,
            telling: false,
        };
        let links = peers.into_iter().map(link).collect();
        let (inbox, changed, closing) = (Mutex::new(inbox), Condvar::new(), OnceLock::new());
        let shared = Self { rank, host, links, silence, inbox, changed, closing };
        for Link { stream, .. } in &shared.links {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(shared.tick()))?;
            stream.set_write_timeout(Some(shared.tick()))?;
        }
        Ok(Arc::new(shared))
    }

    /// The threads of all links.
    pub fn start(self: &Arc<Self>) -> io::Result<Vec<JoinHandle<()>>> {
        let mut threads = Vec::new();
        for index in 0..self.links.len() {
            let spawn = |name: &str, work: fn(&Self, usize)| {
                let shared = Arc::clone(self);
                let name = format!("{name}-{}", self.links[index].rank);
                std::thread::Builder::new().name(name).spawn(move || work(&shared, index))
            };
            threads.push(spawn("dist-read", Self::read)?);
            threads.push(spawn("dist-beat", Self::give_signs)?);
        }
        Ok(threads)
    }

    /// How long a read or a write waits before it looks around.
    fn tick(&self) -> Duration {
        (self.silence / 10).clamp(Duration::from_millis(20), Duration::from_millis(200))
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_failed(&self) -> bool {
        self.inbox().failure.is_some()
    }

    fn is_closing(&self) -> bool {
        self.closing.get().is_some()
    }

    /// The error of an operation after a failure.
    fn error(failure: Failure) -> DistError {
        let Failure { rank, host, cause } = failure;
        DistError::Rank { rank, host, cause }
    }

    /// Takes note of the first failure, and has rank 0 tell the others.
    pub fn record(&self, failure: Failure) {
        let tells = self.rank == 0 || failure.rank == self.rank;
        self.note(failure, tells);
    }

    fn note(&self, failure: Failure, tells: bool) {
        {
            let mut inbox = self.inbox();
            if inbox.failure.is_some() || self.is_closing() {
                return;
            }
            tracing::debug!(?failure, "a rank has failed");
            inbox.failure = Some(failure.clone());
            inbox.telling = true;
            self.changed.notify_all();
        }
        if tells {
            self.tell_all(&failure);
        }
        self.inbox().telling = false;
        self.changed.notify_all();
    }

    /// Sends a failure over all links, as far as they take it.
    fn tell_all(&self, failure: &Failure) {
        let frame = wire::fail(failure);
        for link in &self.links {
            // Whoever is writing stops within a tick, now that there is a failure.
            let deadline = Instant::now() + 3 * self.tick();
            let guard = loop {
                match link.writing.try_lock() {
                    Ok(guard) => break Some(guard),
                    Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                    Err(_) => break None,
                }
            };
            if guard.is_some() {
                // A rank that is stopped has no room for it, and finds the connection closed later.
                let _ = (&link.stream).write_all(&frame);
            }
        }
    }

    fn lost(&self, index: usize, end: End) {
        let Link { rank, host, .. } = &self.links[index];
        let seconds = self.silence.as_secs_f64();
        // A rank that was stopped and goes on learns why the others are gone, rank 0 too.
        let tells = self.rank == 0 || matches!(end, End::Silent);
        let cause = match end {
            End::Stopped => return,
            End::Closed => "its connection ended without a word: the process was killed or has crashed".to_string(),
            End::Silent => format!(
                "nothing came from it for {seconds} s: the process is stopped, its host is gone, or the network between is cut"
            ),
            End::Broken(error) => {
                format!("its connection broke ({error}): the process was killed, or its host is gone")
            }
            End::Rubbish(problem) => format!("what comes from it can't be read: {problem}"),
        };
        self.note(Failure { rank: *rank, host: host.clone(), cause }, tells);
    }

    /// Reads what comes over a link, to its end.
    fn read(&self, index: usize) {
        let mut message: Option<(Call, Vec<u8>, u64)> = None;
        loop {
            let frame = match self.frame(index) {
                Ok(frame) => frame,
                Err(end) => {
                    self.lost(index, end);
                    break;
                }
            };
            match (frame, &mut message) {
                (Frame::Beat, _) => {}
                (Frame::Bye, _) => {
                    self.inbox().left[index] = true;
                    break;
                }
                (Frame::Fail(failure), _) => {
                    self.record(failure);
                    break;
                }
                (Frame::Begin { call, len }, None) => message = Some((call, Vec::new(), len)),
                (Frame::Part(bytes), Some((_, content, len))) if (content.len() + bytes.len()) as u64 <= *len => {
                    content.extend(bytes);
                }
                _ => {
                    self.lost(index, End::Rubbish("its messages are mixed up".into()));
                    break;
                }
            }
            if let Some((call, content, _)) = message.take_if(|(_, content, len)| content.len() as u64 == *len) {
                self.inbox().messages[index].push_back((call, content));
                self.changed.notify_all();
            }
        }
        self.inbox().closed[index] = true;
        self.changed.notify_all();
        if !self.is_closing() {
            self.drain(index);
        }
    }

    /// Takes what still comes and throws it away, so that a connection that is closed has nothing unread, which would cost the other
    /// side what it has not read.
    fn drain(&self, index: usize) {
        let mut buffer = [0; 4096];
        while !self.is_closing() {
            match (&self.links[index].stream).read(&mut buffer) {
                Ok(0) => break,
                Err(error) if !is_timeout(&error) => break,
                _ => {}
            }
        }
    }

    fn frame(&self, index: usize) -> Result<Frame, End> {
        let mut head = [0; HEADER];
        self.fill(index, &mut head)?;
        let (tag, len) = wire::header(head).map_err(End::Rubbish)?;
        let mut content = vec![0; len];
        self.fill(index, &mut content)?;
        wire::frame(tag, content).map_err(End::Rubbish)
    }

    fn fill(&self, index: usize, mut buffer: &mut [u8]) -> Result<(), End> {
        let mut quiet = Duration::ZERO;
        while !buffer.is_empty() {
            match (&self.links[index].stream).read(buffer) {
                Ok(0) => return Err(if self.is_closing() { End::Stopped } else { End::Closed }),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    quiet = Duration::ZERO;
                }
                Err(error) if is_timeout(&error) => quiet += self.tick(),
                Err(error) => return Err(if self.is_closing() { End::Stopped } else { End::Broken(error) }),
            }
            if self.closing.get().is_some_and(|since| since.elapsed() > LINGER) {
                return Err(End::Stopped);
            }
            if quiet > self.silence {
                return Err(End::Silent);
            }
        }
        Ok(())
    }

    /// Gives signs of life over a link.
    fn give_signs(&self, index: usize) {
        let (interval, beat) = ((self.silence / 10).min(Duration::from_secs(1)), wire::beat());
        loop {
            let inbox = self.inbox();
            let over = |inbox: &mut Inbox| inbox.failure.is_none() && !inbox.left[index] && !self.is_closing();
            let waited = self.changed.wait_timeout_while(inbox, interval, over);
            let (mut inbox, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if !over(&mut inbox) {
                break;
            }
            drop(inbox);
            if self.write(index, &beat).is_err() {
                break;
            }
        }
    }

    /// Writes a frame; waits as long as there are signs that somebody reads.
    fn write(&self, index: usize, mut bytes: &[u8]) -> Result<(), ()> {
        let link = &self.links[index];
        let writing = link.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut quiet = Duration::ZERO;
        while !bytes.is_empty() {
            match (&link.stream).write(bytes) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    quiet = Duration::ZERO;
                }
                Err(error) if is_timeout(&error) => quiet += self.tick(),
                Err(error) => {
                    // The reader may be about to learn why.
                    drop(writing);
                    self.wait_for_last_words(index);
                    self.lost(index, End::Broken(error));
                    return Err(());
                }
            }
            if self.has_failed() {
                return Err(());
            }
            if quiet > self.silence {
                drop(writing);
                self.lost(index, End::Silent);
                return Err(());
            }
        }
        Ok(())
    }

    fn wait_for_last_words(&self, index: usize) {
        let waiting = |inbox: &mut Inbox| inbox.failure.is_none() && !inbox.closed[index];
        drop(self.changed.wait_timeout_while(self.inbox(), LAST_WORDS, waiting));
    }

    /// Sends a message over a link.
    pub fn send(&self, index: usize, call: Call, bytes: &[u8]) -> Result<(), DistError> {
        if self.inbox().left[index] {
            return Err(self.why(index));
        }
        let mut frames = std::iter::once(wire::begin(call, bytes.len())).chain(bytes.chunks(PART).map(wire::part));
        match frames.try_for_each(|frame| self.write(index, &frame)) {
            Ok(()) => Ok(()),
            Err(()) => Err(self.why(index)),
        }
    }

    /// Why nothing goes over a link any more.
    fn why(&self, index: usize) -> DistError {
        let Link { rank, host, .. } = &self.links[index];
        let early = || Failure { rank: *rank, host: host.clone(), cause: "it has ended before the others".into() };
        Self::error(self.inbox().failure.clone().unwrap_or_else(early))
    }

    /// The next message of a link, which must be of `call`.
    pub fn receive(&self, index: usize, call: Call) -> Result<Vec<u8>, DistError> {
        let waiting =
            |inbox: &mut Inbox| inbox.failure.is_none() && inbox.messages[index].is_empty() && !inbox.left[index];
        let mut inbox = self.changed.wait_while(self.inbox(), waiting).unwrap_or_else(PoisonError::into_inner);
        // What came before a failure counts: its sender was done with the operation.
        let message = inbox.messages[index].pop_front();
        drop(inbox);
        let Some((found, content)) = message else { return Err(self.why(index)) };
        if found != call {
            // Ranks that learn of a failure at different operations are out of step, and the failure is the reason.
            if self.has_failed() {
                return Err(self.why(index));
            }
            let Link { rank, host, .. } = &self.links[index];
            let (expected, found) = (call.to_string(), found.to_string());
            return Err(DistError::OutOfStep { rank: *rank, host: host.clone(), expected, found });
        }
        Ok(content)
    }

    /// What ended the operations, if something did.
    pub fn failure(&self) -> Option<DistError> {
        self.inbox().failure.clone().map(Self::error)
    }

    /// Waits for a failure; `None` when the group ends without one.
    pub fn next_failure(&self) -> Option<DistError> {
        let going_on = |inbox: &mut Inbox| inbox.failure.is_none() && !self.is_closing();
        let inbox = self.changed.wait_while(self.inbox(), going_on).unwrap_or_else(PoisonError::into_inner);
        inbox.failure.clone().map(Self::error)
    }

    /// Leaves: says so, unless there was a failure, and lets the others read it.
    pub fn leave(&self, threads: Vec<JoinHandle<()>>) {
        let telling = self.changed.wait_timeout_while(self.inbox(), LAST_WORDS, |inbox| inbox.telling);
        drop(telling);
        let failed = self.has_failed();
        for (index, link) in self.links.iter().enumerate() {
            let left = self.inbox().left[index];
            if !failed && left {
                // A rank that has left may read on until it hears this, and would take the end of the connection for a failure. It
                // may also be gone, which is none.
                let _ = (&link.stream).write(&wire::bye());
            } else if !failed {
                let _ = self.write(index, &wire::bye());
            }
            let _ = link.stream.shutdown(Shutdown::Write);
        }
        {
            // Under the lock, so that nobody is between a look at it and the wait.
            let _inbox = self.inbox();
            let _ = self.closing.set(Instant::now());
        }
        self.changed.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
