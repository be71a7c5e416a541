//! Runs in L1 and starts, feeds, signals and reports processes for the harness (`ringvm_tests::lab::wire`).

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ringvm_tests::lab::wire::{Exit, Frame, Start};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How long output is still collected from a process that left its pipes to a child of its own.
const STRAGGLERS: Duration = Duration::from_secs(1);

type Port = Arc<Mutex<File>>;

/// A process that was started and has not ended. Its stdin has a thread of its own: a process that does not read must
/// not hold up the others.
struct Running {
    pid: Pid,
    stdin: Sender<Vec<u8>>,
}

type Table = Arc<Mutex<HashMap<u32, Running>>>;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("lab-agent: usage: lab-agent PORT");
        return ExitCode::FAILURE;
    };
    match serve(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lab-agent: serving {path}: {e}");
            ExitCode::FAILURE
        }
    }
}

fn serve(path: &str) -> io::Result<()> {
    let mut input = OpenOptions::new().read(true).write(true).open(path)?;
    let port: Port = Arc::new(Mutex::new(input.try_clone()?));
    let table = Table::default();
    send(&port, &Frame::Ping(0));
    loop {
        match Frame::read(&mut input)? {
            Frame::Start(id, start) => begin(&port, &table, id, &start),
            Frame::Stdin(id, bytes) => {
                if let Some(running) = lock(&table).get(&id) {
                    // Its thread is gone when the process has ended or closed its stdin.
                    let _ = running.stdin.send(bytes);
                }
            }
            Frame::Signal(id, number) => {
                if let (Some(running), Some(signal)) = (lock(&table).get(&id), Signal::from_named_raw(number)) {
                    // It may have ended just now; the harness learns that from its exit.
                    let _ = kill_process(running.pid, signal);
                }
            }
            Frame::Kill(id) => {
                if let Some(running) = lock(&table).get(&id) {
                    let _ = kill_process_group(running.pid, Signal::KILL);
                }
            }
            Frame::Ping(id) => send(&port, &Frame::Ping(id)),
            other => return Err(io::Error::other(format!("unexpected {other:?}"))),
        }
    }
}

fn begin(port: &Port, table: &Table, id: u32, start: &Start) {
    let spawned =
        start.argv.split_first().ok_or_else(|| io::Error::other("no program")).and_then(|(program, arguments)| {
            Command::new(program)
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0)
                .spawn()
        });
    let mut child = match spawned {
        Ok(child) => child,
        Err(e) => return send(port, &Frame::Exited(id, Exit::Unstarted(e.to_string()))),
    };
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return };
    let (stdin, bytes) = mpsc::channel();
    lock(table).insert(id, Running { pid, stdin });
    send(port, &Frame::Started(id, pid.as_raw_nonzero().get()));
    if let Some(pipe) = child.stdin.take() {
        thread::spawn(move || feed(pipe, &bytes));
    }
    let (done, all_done) = mpsc::channel();
    if let Some(pipe) = child.stdout.take() {
        copy(pipe, Arc::clone(port), done.clone(), move |bytes| Frame::Stdout(id, bytes));
    }
    if let Some(pipe) = child.stderr.take() {
        copy(pipe, Arc::clone(port), done, move |bytes| Frame::Stderr(id, bytes));
    }
    let (port, table) = (Arc::clone(port), Arc::clone(table));
    thread::spawn(move || end(child, id, &port, &table, &all_done));
}

fn feed(mut pipe: ChildStdin, bytes: &Receiver<Vec<u8>>) {
    while let Ok(bytes) = bytes.recv() {
        if bytes.is_empty() || pipe.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn copy(
    mut pipe: impl Read + Send + 'static,
    port: Port,
    done: Sender<()>,
    frame: impl Fn(Vec<u8>) -> Frame + Send + 'static,
) {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            send(&port, &frame(buffer[..count].to_vec()));
        }
        drop(done);
    });
}

fn end(mut child: Child, id: u32, port: &Port, table: &Table, all_done: &Receiver<()>) {
    let exit = match child.wait() {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Unstarted(status.to_string()),
        },
        Err(e) => Exit::Unstarted(e.to_string()),
    };
    // Returns when both copies have ended, or after the limit when a grandchild holds a pipe open.
    let _ = all_done.recv_timeout(STRAGGLERS);
    lock(table).remove(&id);
    send(port, &Frame::Exited(id, exit));
}

fn send(port: &Port, frame: &Frame) {
    if let Err(e) = frame.write(&mut *lock(port)) {
        // Without its port the agent is of no use; its end powers L1 off, and the harness sees that.
        eprintln!("lab-agent: writing to the harness: {e}");
        std::process::exit(1);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
