//! A machine in the test's own process, through the library: what a control plane does with one, without a control plane.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use ringvm::boot::{BootSource, Kernel};
use ringvm::config::{BootProtocol, CpuConfig, MemoryConfig};
use ringvm::console::{Console, Streams};
use ringvm::control::{self, Request};
use ringvm::events::Events;
use ringvm::kvm::Kvm;
use ringvm::machine::ending::Limits;
use ringvm::machine::{Blueprint, Machine, MachineError, Running};
use ringvm::pci::Bdf;
use ringvm_backends::device::Device;
use ringvm_tests::embedded::kernel;

/// For whatever a busy machine may take its time for.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A machine in this process, and what its guest says.
pub(crate) struct Guest {
    /// The machine.
    pub(crate) running: Running,
    /// What the guest says.
    pub(crate) lines: Receiver<String>,
    console: Console,
}

impl Guest {
    /// Starts the embedded guest with a job and no device.
    pub(crate) fn start(job: &str) -> Self {
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
    pub(crate) fn expect(&self, text: &str) {
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

    /// Has a request served as the main thread does.
    pub(crate) fn serve(&self, request: Request) {
        control::serve(request, &self.running, &[]);
    }

    /// Attaches a device.
    pub(crate) fn attach(&self, device: Box<dyn Device>) -> Result<Bdf, MachineError> {
        let (reply, answer) = bounded(1);
        self.serve(Request::Attach(device, reply));
        answer.recv_timeout(LIMIT).expect("the request is served")
    }

    /// Detaches a device, and waits until nothing of it is in flight.
    pub(crate) fn detach(&self, name: &str) -> Result<Box<dyn Device>, MachineError> {
        let (reply, answer) = bounded(1);
        self.serve(Request::Detach(name.to_owned(), reply));
        let taken = answer.recv_timeout(LIMIT).expect("the request is served")?;
        Ok(taken.recv_timeout(LIMIT).expect("nothing of it is in flight").device)
    }

    /// Ends the machine, in order.
    pub(crate) fn stop(self) {
        let stopped = self.running.stop(Limits::within(LIMIT));
        assert!(stopped.abandoned.is_empty(), "{:?}", stopped.abandoned);
        self.console.finish();
    }
}

/// Whether any process has a lock on a file.
pub(crate) fn is_locked(path: &Path) -> bool {
    let inode = format!(":{} ", fs::metadata(path).expect("the image is there").st_ino());
    fs::read_to_string("/proc/locks").expect("Linux lists locks").lines().any(|line| line.contains(&inode))
}
