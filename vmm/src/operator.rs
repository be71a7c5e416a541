//! The operator's requests by signal: a client of the machine's control that prints the answers.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use ringvm_cli::summary::summary;

use crate::control::{Control, ControlError, Request};
use crate::placement::{Moved, Place, PlaceError};

/// A request of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The statistics of all devices.
    Statistics,
    /// Devices that can move do.
    Move,
}

/// Most wishes that may wait.
const WISHES: usize = 16;
/// How long a device may take to say what it has done.
const ANSWER: Duration = Duration::from_secs(1);
/// How long the end of the process waits for what was asked for before.
const LAST: Duration = Duration::from_millis(500);

/// Takes wishes, from any thread and without waiting.
#[derive(Clone)]
pub struct Wishes(Sender<Wish>);

impl Wishes {
    /// Adds a wish. One too many is refused with a line.
    pub fn add(&self, wish: Wish) {
        if self.0.try_send(wish).is_err() {
            eprintln!("ringvm: {WISHES} requests wait already; ask again later");
        }
    }
}

/// The operator's thread.
pub struct Operator {
    wishes: Wishes,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Operator {
    /// Starts the thread, which ends with the last holder of its wishes.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start(control: Control) -> io::Result<Self> {
        let (wishes, wanted) = bounded(WISHES);
        let (alive, ended) = bounded::<()>(0);
        thread::Builder::new().name("operator".into()).spawn(move || {
            let _alive = alive;
            serve(&control, &wanted);
        })?;
        Ok(Self { wishes: Wishes(wishes), ended })
    }

    /// Where wishes go.
    #[must_use]
    pub fn wishes(&self) -> Wishes {
        self.wishes.clone()
    }

    /// Lets the thread end, but waits for it only for a limited time: its answer may never come.
    pub fn finish(self) {
        drop(self.wishes);
        // A disconnect.
        let _ = self.ended.recv_timeout(LAST);
    }
}

fn serve(control: &Control, wanted: &Receiver<Wish>) {
    let (moved, moves) = unbounded();
    loop {
        select! {
            recv(wanted) -> wish => match wish {
                Ok(Wish::Statistics) => print_statistics(control),
                Ok(Wish::Move) => {
                    if let Err(error) = control.ask(Request::Move(None, moved.clone())) {
                        eprintln!("ringvm: {error}");
                    }
                }
                Err(_) => return,
            },
            recv(moves) -> result => result.iter().for_each(print_move),
        }
    }
}

fn print_statistics(control: &Control) {
    let (reply, answer) = bounded(1);
    let asked = control.ask(Request::Statistics(reply));
    let deadline = Instant::now() + ANSWER;
    let devices = match asked.and_then(|()| answer.recv_deadline(deadline).map_err(|_| ControlError::Ended)) {
        Ok(devices) => devices,
        Err(error) => return eprintln!("ringvm: {error}"),
    };
    let mut silent = Vec::new();
    let answers = devices.into_iter().filter_map(|device| {
        let answer = device.answer.recv_deadline(deadline).ok();
        if answer.is_none() {
            silent.push(device.name);
        }
        answer
    });
    let answers: Vec<_> = answers.collect();
    eprint!("{}", summary(&answers));
    if !silent.is_empty() {
        eprintln!("ringvm: no answer from {}, which waits for its storage or its daemon", silent.join(", "));
    }
}

fn print_move(result: &Result<Moved, PlaceError>) {
    match result {
        Ok(Moved { name, place, pause }) => {
            let place = match place {
                Place::Process => "this process",
                Place::Daemon => "a daemon",
            };
            eprintln!("{name}: moved to {place}, nobody served it for {} us", pause.as_micros());
        }
        Err(error) => eprintln!("ringvm: {error}; it stays where it is"),
    }
}
