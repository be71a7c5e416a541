//! The end of a daemon, within its time: sessions are ended, devices flushed, all of them at once. A part that does
//! not end is given up, with a line that says what may be lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use ringvm_backends::device::DeviceError;
use ringvm_backends::trace;
use ringvm_cli::summary::summary;
use tracing::debug_span;

use crate::control::{Control, Told};
use crate::exit::Exit;

/// How long the main thread may take to hear of a second signal.
const HEARING: Duration = Duration::from_secs(1);
/// How often to look whether it has.
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// Why a daemon ends: lines to print, and the exit code.
pub(crate) type Failure = (String, Exit);

/// The deadlines of the stages of the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    /// For requests in flight that can't be cancelled.
    pub(crate) session: Duration,
    /// Deadline of the control threads; devices whose thread is not done by then are flushed without it.
    flush: Duration,
    /// Until all is given up.
    last: Duration,
}

impl Deadlines {
    pub(crate) fn within(limit: Duration) -> Self {
        Self { session: limit * 3 / 10, flush: limit * 4 / 10, last: limit * 8 / 10 }
    }
}

/// Ends the process unless it is `over` soon: other threads, which were told to end at once, may be waiting for
/// something that never comes.
pub(crate) fn exit_soon(over: &AtomicBool) {
    let deadline = Instant::now() + HEARING;
    while !over.load(Ordering::Acquire) {
        if Instant::now() >= deadline {
            std::process::exit(Exit::Host as i32);
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// Ends the threads, and makes written data durable. Threads that can't be ended are left to the exit of the process,
/// which follows. `died` is who has panicked, if that is the reason.
pub(crate) fn finish(
    program: &str,
    mut controls: Vec<Control>,
    (tell, told): (&Sender<Told>, &Receiver<Told>),
    deadlines: &Deadlines,
    stats: bool,
    died: Option<String>,
) -> Result<(), Failure> {
    let begun = Instant::now();
    controls.iter().for_each(|control| control.mailbox.stop());
    let mut flushed: Vec<Option<Result<(), DeviceError>>> = controls.iter().map(|_| None).collect();
    let mut until = begun + deadlines.flush;
    let mut at_once = false;
    while controls.iter().any(|control| control.report.is_none()) && !at_once {
        match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Told::Ended(index, report)) => controls[index].report = Some(report),
            Ok(Told::Flushed(index, result)) => flushed[index] = Some(result),
            Ok(Told::AtOnce) => at_once = true,
            Ok(Told::End | Told::Statistics) => {}
            // One more, or the first while the daemon ends anyway.
            Ok(Told::Died(_)) => {}
            Err(RecvTimeoutError::Timeout) if until < begun + deadlines.last => {
                until = begun + deadlines.last;
                flush_the_others(&mut controls, tell);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    let died = died.map(|who| format!("{who} panicked, its clients are lost; this is a bug"));
    let mut failures: Vec<Failure> = died.into_iter().map(|line| (line, Exit::Internal)).collect();
    let mut total = Vec::new();
    let mut all_ended = true;
    for (control, flushed) in controls.iter_mut().zip(flushed) {
        let name = &control.name;
        let (idle, flushed) = match &mut control.report {
            Some(report) => {
                total.extend(report.device.as_ref().map(|device| device.stats()));
                if report.device.is_none() {
                    failures.push((format!("the control thread of {name} died; this is a bug"), Exit::Internal));
                }
                (report.idle, Some(std::mem::replace(&mut report.flushed, Ok(()))))
            }
            None => (false, flushed),
        };
        all_ended &= idle;
        let lost = match flushed {
            Some(Ok(())) if idle => continue,
            Some(Ok(())) => format!("{name}: given up with requests in flight; what was answered is on the disk"),
            Some(Err(error)) => format!("at the end: {error}; what was written last may be lost"),
            None => format!("{name}: given up before it was flushed; what was written last may be lost"),
        };
        failures.push((lost, Exit::Host));
    }
    if stats {
        eprint!("{}", summary(&total));
    }
    if !all_ended {
        // Nothing is dropped that would wait for requests in flight.
        failures.iter().for_each(|(line, _)| eprintln!("{program}: {line}"));
        std::process::exit(failures.first().map_or(Exit::Host, |&(_, exit)| exit) as i32);
    }
    let Some(&(_, exit)) = failures.first() else { return Ok(()) };
    Err((failures.into_iter().map(|(line, _)| line).collect::<Vec<_>>().join("\n"), exit))
}

/// Flushes devices on threads of their own: their control threads wait for something.
fn flush_the_others(controls: &mut [Control], tell: &Sender<Told>) {
    for (index, control) in controls.iter_mut().enumerate().filter(|(_, control)| control.report.is_none()) {
        let Some(flusher) = control.flusher.take() else { continue };
        let tell = tell.clone();
        let span = trace::device(&control.name);
        let flush =
            move || drop(tell.send(Told::Flushed(index, span.in_scope(|| debug_span!("flush").in_scope(flusher)))));
        // Without a thread it can't be flushed, and that is said.
        drop(std::thread::Builder::new().name("flush".into()).spawn(flush));
    }
}
