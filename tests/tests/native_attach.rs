//! Devices that come to a running machine and leave it: nothing of them stays, and an image is locked exactly as long as its disk
//! is there.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use ringvm::boot::{BootSource, Kernel};
use ringvm::config::{BootProtocol, CpuConfig, MemoryConfig};
use ringvm::console::{Console, Streams};
use ringvm::events::Events;
use ringvm::kvm::Kvm;
use ringvm::machine::ending::Limits;
use ringvm::machine::{Blueprint, Machine, MachineError, Running};
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_tests::embedded::{image, kernel, ready};

const LIMIT: Duration = Duration::from_secs(120);
const ROUNDS: usize = 1000;
/// What is set up once is there after so many.
const WARM: usize = 10;

/// A machine in this process, and what its guest says.
struct Guest {
    running: Running,
    lines: Receiver<String>,
    console: Console,
}

/// What this process and its machine hold.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: Vec<String>,
    mappings: usize,
    routes: usize,
}

impl Guest {
    fn start(job: &str) -> Self {
        let kvm = Kvm::open().expect("KVM is there");
        let kernel = Kernel::open(kernel(), BootProtocol::Auto).expect("the guest is a kernel");
        let (events, _) = Events::channel();
        let (said, output) = std::io::pipe().expect("a pipe");
        let streams = Streams {
            output: OwnedFd::from(output).into(),
            name: "a pipe".into(),
            limit: None,
            input: None,
            escape: false,
        };
        let console = Console::start(streams, events.clone()).expect("a console");
        let memory = MemoryConfig { size: 64 << 20, ..MemoryConfig::default() };
        let blueprint = Blueprint {
            kvm: &kvm,
            cpus: CpuConfig::default(),
            memory: &memory,
            boot: BootSource { kernel: &kernel, initramfs: None, cmdline: job },
            console: Some(&console),
            events: &events,
        };
        let running = Machine::build(&blueprint, &mut Vec::new()).and_then(Machine::start).expect("a machine");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            BufReader::new(said).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { running, lines, console }
    }

    /// Waits until the guest says something with this text in it.
    fn expect(&self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|e| panic!("the guest did not say `{text}`: {e}"));
            assert!(!line.contains("FAILED"), "{line}");
            if line.contains(text) {
                return;
            }
        }
    }

    fn stop(self) {
        let stopped = self.running.stop(Limits::within(LIMIT));
        assert!(stopped.abandoned.is_empty(), "{:?}", stopped.abandoned);
        self.console.finish();
    }
}

fn held(running: &Running) -> Held {
    let tasks = fs::read_dir("/proc/self/task").expect("Linux lists threads");
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    let mut threads: Vec<String> = tasks.filter_map(|task| task.ok().map(name)).collect();
    threads.sort();
    Held {
        descriptors: fs::read_dir("/proc/self/fd").expect("Linux lists descriptors").count(),
        threads,
        mappings: fs::read_to_string("/proc/self/maps").expect("Linux lists mappings").lines().count(),
        routes: running.interrupt_routes(),
    }
}

/// Waits until as much is held as before: the kernel lists a thread that has ended for a moment more.
fn expect_held(running: &Running, before: &Held) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = held(running);
        if now == *before {
            return;
        }
        assert!(Instant::now() < deadline, "{before:?} -> {now:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether any process has a lock on a file.
fn is_locked(path: &Path) -> bool {
    let inode = format!(":{} ", fs::metadata(path).expect("the image is there").st_ino());
    fs::read_to_string("/proc/locks").expect("Linux lists locks").lines().any(|line| line.contains(&inode))
}

#[test]
fn a_disk_comes_and_goes_a_thousand_times() {
    if !ready() {
        return;
    }
    let image = image(1);
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let guest = Guest::start(&format!("job=hotplug rounds={ROUNDS}"));
    guest.expect("start job=hotplug");
    let options = BlockOptions { path: Some(image.path().into()), ..BlockOptions::default() };
    let mut before = None;
    for round in 0..ROUNDS {
        if round == WARM {
            before = Some(held(&guest.running));
        }
        assert!(!is_locked(image.path()), "round {round}: no disk, no lock");
        let disk = BlockDevice::open("disk9", &options, &pool).expect("the image is free");
        let bdf = guest.running.attach(Box::new(disk)).expect("it is attached");
        guest.expect(&format!("let-go round={round} slot={}", bdf.slot));
        assert!(is_locked(image.path()), "round {round}: locked as long as it is there");
        let taken = guest.running.detach("disk9").expect("it is there");
        drop(taken.recv_timeout(LIMIT).expect("nothing of it is in flight"));
        // The next one has the same slot: the guest is to see that this one is not there.
        guest.expect(&format!("gone round={round}"));
        if let Some(before) = &before {
            expect_held(&guest.running, before);
        }
    }
    eprintln!("{ROUNDS} times; before and after: {before:?}");
    guest.expect("result job=hotplug");
    guest.stop();
}

#[test]
fn a_name_is_attached_once() {
    if !ready() {
        return;
    }
    let (one, other) = (image(1), image(1));
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let guest = Guest::start("job=none");
    let disk = |image: &tempfile::NamedTempFile| {
        let options = BlockOptions { path: Some(image.path().into()), ..BlockOptions::default() };
        Box::new(BlockDevice::open("data", &options, &pool).expect("the image is free"))
    };
    guest.running.attach(disk(&one)).expect("it is attached");
    let error = guest.running.attach(disk(&other)).expect_err("there is one of that name");
    assert!(matches!(&error, MachineError::Attached(name) if name == "data"), "{error}");
    assert!(!is_locked(other.path()), "what was refused is let go");
    assert!(matches!(guest.running.detach("date"), Err(MachineError::NoDevice(_))));
    drop(guest.running.detach("data").expect("it is there").recv_timeout(LIMIT).expect("it is idle"));
    guest.running.attach(disk(&one)).expect("the name is free again");
    guest.stop();
}

#[test]
fn slots_run_out_and_come_back() {
    if !ready() {
        return;
    }
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let guest = Guest::start("job=none");
    let rng = |n: usize| Box::new(ringvm_backends::rng::RngDevice::new(&format!("rng{n}"), &pool));
    for n in 0..31 {
        guest.running.attach(rng(n)).expect("there is room for 31 beside the host bridge");
    }
    assert!(matches!(guest.running.attach(rng(31)), Err(MachineError::Pci(_))));
    drop(guest.running.detach("rng7").expect("it is there").recv_timeout(LIMIT).expect("it is idle"));
    assert_eq!(guest.running.attach(rng(31)).expect("there is room again").slot, 8);
    guest.stop();
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on_where_it_was() {
    if !ready() {
        return;
    }
    let guest = Guest::start("job=hotplug rounds=1");
    guest.expect("start job=hotplug");
    let vcpus = guest.running.vcpus();
    let (paused, heard) = crossbeam_channel::unbounded();
    vcpus.iter().for_each(|vcpu| vcpu.pause(paused.clone()));
    assert_eq!(heard.recv_timeout(LIMIT), Ok(0));
    let save = || {
        let (reply, state) = crossbeam_channel::bounded(1);
        vcpus[0].save(reply);
        state.recv_timeout(LIMIT).expect("a paused vCPU says what state it is in")
    };
    let (first, second) = (save(), save());
    assert_eq!((first.regs.rip, first.regs.rsp), (second.regs.rip, second.regs.rsp));
    assert_ne!(first.regs.rip, 0);
    // A disk that comes now is not found before the guest goes on.
    let image = image(1);
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let options = BlockOptions { path: Some(image.path().into()), ..BlockOptions::default() };
    let disk = BlockDevice::open("disk9", &options, &pool).expect("the image is free");
    guest.running.attach(Box::new(disk)).expect("it is attached");
    assert!(guest.lines.recv_timeout(Duration::from_millis(300)).is_err(), "a paused guest says nothing");
    vcpus.iter().for_each(|vcpu| vcpu.resume());
    guest.expect("let-go round=0");
    guest.stop();
}
