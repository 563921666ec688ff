//! Ctrl-C: it ends an answer that is under way, and otherwise the program.

#[cfg(unix)]
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::exit::Code;
#[cfg(unix)]
use crate::output::tell;
use crate::signals::on_interrupt;

/// What a signal meets.
#[derive(Debug, Default)]
pub struct Interrupts {
    is_answering: AtomicBool,
    stop: Notify,
}

impl Interrupts {
    /// Listens for signals. Without a terminal nobody goes on after one: it ends the program at once.
    pub fn listen(is_terminal: bool) -> Result<Arc<Self>> {
        let interrupts = Arc::new(Self::default());
        let theirs = interrupts.clone();
        let modes = Modes::now();
        on_interrupt(move || {
            if is_terminal && theirs.is_answering.load(Ordering::Acquire) {
                theirs.stop.notify_waiters();
                return;
            }
            modes.restore();
            std::process::exit(Code::Interrupted as i32);
        })?;
        Ok(interrupts)
    }

    /// From now on, a signal completes this future instead of ending the program.
    pub fn begin(&self) -> Notified<'_> {
        let notified = self.stop.notified();
        self.is_answering.store(true, Ordering::Release);
        notified
    }

    /// Signals end the program again.
    pub fn end(&self) {
        self.is_answering.store(false, Ordering::Release);
    }
}

/// Has a terminal tell a paste apart no more, which it does while a line is edited
/// (<https://invisible-island.net/xterm/ctlseqs/ctlseqs.html>, DECRST 2004).
#[cfg(unix)]
const PASTES_ARE_TYPED: &str = "\u{1b}[?2004l\r\n";

/// How the terminal was before a line was edited: a program that a signal ends in the middle of one leaves it so.
struct Modes {
    #[cfg(unix)]
    before: Option<nix::sys::termios::Termios>,
}

#[cfg(unix)]
impl Modes {
    fn now() -> Self {
        Self { before: nix::sys::termios::tcgetattr(std::io::stdin()).ok() }
    }

    fn restore(&self) {
        use nix::sys::termios::{SetArg, tcsetattr};
        if let Some(before) = &self.before {
            // The program ends either way.
            tcsetattr(std::io::stdin(), SetArg::TCSANOW, before).ok();
            if std::io::stdout().is_terminal() {
                tell(PASTES_ARE_TYPED);
            }
        }
    }
}

#[cfg(not(unix))]
impl Modes {
    fn now() -> Self {
        Self {}
    }

    fn restore(&self) {}
}
