//! Signals that end the program: Ctrl-C, SIGTERM, and SIGHUP when the terminal goes.

use anyhow::{Context, Result};

/// Has Ctrl-C, SIGTERM and SIGHUP call `handler`, on a thread of its own. A signal that was ignored when the program started (SIGHUP
/// under `nohup`) stays ignored.
///
/// # Errors
/// The system gives no handler.
pub fn on_interrupt(handler: impl FnMut() + Send + 'static) -> Result<()> {
    let ignored = ignored_hangup();
    ctrlc::set_handler(handler).context("can't listen for Ctrl-C")?;
    if ignored {
        ignore_hangup();
    }
    Ok(())
}

#[cfg(unix)]
fn ignored_hangup() -> bool {
    use nix::sys::signal::{SigHandler, Signal, sigaction};
    let Some(before) = ignore_hangup() else { return false };
    let ignored = matches!(before.handler(), SigHandler::SigIgn);
    if !ignored {
        // SAFETY: gives back what was set when the program started.
        let _ = unsafe { sigaction(Signal::SIGHUP, &before) };
    }
    ignored
}

/// Ignores SIGHUP; returns what was set before.
#[cfg(unix)]
fn ignore_hangup() -> Option<nix::sys::signal::SigAction> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: to ignore a signal runs no code.
    unsafe { sigaction(Signal::SIGHUP, &ignore) }.ok()
}

#[cfg(not(unix))]
fn ignored_hangup() -> bool {
    false
}

#[cfg(not(unix))]
fn ignore_hangup() {}
