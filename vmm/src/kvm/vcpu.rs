//! vCPUs: one thread each, which runs the guest and hands its exits to the buses.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tracing::{debug, warn};

use super::error::{KvmError, call};
use super::run_page::RunPage;
use super::signal::{self, Armed};
use super::state::VcpuState;
use super::vm::{Kvm, Vm};
use crate::arch::x86_64::cpuid::{self, Template, Traits};
use crate::arch::x86_64::msr::BOOT_MSRS;
use crate::arch::x86_64::regs::{Entry, boot_registers};
use crate::bus::Buses;
use crate::config::CpuConfig;
use crate::events::{Ending, Events};

/// Exits need little stack.
const STACK: usize = 256 << 10;
/// How long vCPUs may take to stop: an exit may have to wait for a device.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// A signal that came before the thread was ready is repeated after this.
const KICK_INTERVAL: Duration = Duration::from_millis(50);

const KVM_SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const KVM_SYSTEM_EVENT_RESET: u32 = 2;

/// Commands to a vCPU thread.
enum Command {
    /// Leave the guest and end.
    Stop,
    /// Leave the guest, report it, and wait for the next command.
    Pause(Sender<u32>),
    /// Continue after a pause.
    Resume,
    /// Report the state of the vCPU. Only a paused one is asked.
    Save(Sender<Box<VcpuState>>),
}

/// Most commands that may wait for a vCPU.
const COMMANDS: usize = 8;

/// The vCPUs of a machine, created and set up but not running.
pub struct Vcpus {
    vm: Arc<Vm>,
    vcpus: Vec<(VcpuFd, RunPage)>,
}

impl Vcpus {
    /// Creates the vCPUs; the first starts at `entry`, the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(kvm: &Kvm, vm: &Arc<Vm>, cpus: CpuConfig, entry: Entry) -> Result<Self, KvmError> {
        let (count, limit) = (cpus.count, kvm.max_vcpus());
        if count == 0 || count > limit {
            return Err(KvmError::Cpus { wanted: count, limit });
        }
        if !cpus.pmu {
            // CPUID only says that there are no counters; this takes the counters themselves away, even from a guest
            // that asks for them.
            vm.disable_pmu()?;
        }
        let vcpus = (0..count).map(|id| create(vm, id)).collect::<Result<Vec<_>, _>>()?;
        let first = &vcpus[0].0;
        let traits = Traits {
            cpus: count,
            nested: cpus.nested,
            pmu: cpus.pmu,
            tsc_deadline: kvm.tsc_deadline(),
            tsc_khz: first.get_tsc_khz().ok().filter(|&khz| khz > 0),
        };
        let template = Template::new(&kvm.supported_cpuid, cpuid::host, &traits);
        for (id, (fd, _)) in (0..).zip(&vcpus) {
            fd.set_cpuid2(&cpuid_table(&template.for_vcpu(id))?)
                .map_err(call(format!("setting the CPUID of vCPU {id}")))?;
            set_boot_msrs(fd);
        }
        let mut sregs = first.get_sregs().map_err(call("reading the registers of vCPU 0"))?;
        let regs = boot_registers(&mut sregs, &vm.memory, entry)
            .map_err(|error| KvmError::Call { what: "preparing vCPU 0".into(), source: io::Error::other(error) })?;
        first.set_sregs(&sregs).map_err(call("setting the registers of vCPU 0"))?;
        first.set_regs(&regs).map_err(call("setting the registers of vCPU 0"))?;
        Ok(Self { vm: Arc::clone(vm), vcpus })
    }

    /// Lets them run, each on a thread of its own.
    ///
    /// # Errors
    /// When the host has no thread left; those already started are stopped.
    pub fn start(self, buses: &Arc<Buses>, events: &Events) -> Result<Vec<VcpuThread>, KvmError> {
        let mut threads = Vec::with_capacity(self.vcpus.len());
        for (id, (fd, page)) in (0..).zip(self.vcpus) {
            let (commands, receiver) = bounded(COMMANDS);
            let (running, ended) = bounded::<()>(0);
            let runner = Runner {
                id,
                vm: Arc::clone(&self.vm),
                buses: Arc::clone(buses),
                events: events.clone(),
                commands: receiver,
            };
            let spawned = thread::Builder::new().name(format!("vcpu{id}")).stack_size(STACK).spawn(move || {
                let _running = running;
                runner.run(fd, page);
            });
            match spawned {
                Ok(thread) => threads.push(VcpuThread { id, thread, commands, ended }),
                Err(source) => {
                    VcpuThread::stop_all(threads, Instant::now() + STOP_LIMIT);
                    return Err(KvmError::Call { what: format!("starting the thread of vCPU {id}"), source });
                }
            }
        }
        Ok(threads)
    }
}

fn cpuid_table(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, KvmError> {
    CpuId::from_entries(entries).map_err(|error| KvmError::Call {
        what: format!("putting together {} CPUID leaves", entries.len()),
        source: io::Error::other(format!("{error:?}")),
    })
}

/// Sets the MSRs of the start. A host that refuses one is only noted.
fn set_boot_msrs(vcpu: &VcpuFd) {
    // One call each: KVM_SET_MSRS stops at the first that it refuses.
    for (index, data) in BOOT_MSRS {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let set = Msrs::from_entries(&[entry]).ok().and_then(|msrs| vcpu.set_msrs(&msrs).ok());
        if set != Some(1) {
            debug!(msr = format_args!("{index:#x}"), "KVM of this host does not let this MSR be set; going on without");
        }
    }
}

fn create(vm: &Vm, id: u32) -> Result<(VcpuFd, RunPage), KvmError> {
    let fd = vm.fd.create_vcpu(u64::from(id)).map_err(call(format!("creating vCPU {id}")))?;
    // SAFETY: `fd` is open for as long as it is borrowed here.
    #[allow(unsafe_code, reason = "VcpuFd does not offer AsFd")]
    let page = RunPage::new(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }, vm.fd.run_size());
    match page {
        Ok(page) => Ok((fd, page)),
        Err(source) => Err(KvmError::Call { what: format!("mapping what vCPU {id} shares"), source }),
    }
}

/// A running vCPU.
pub struct VcpuThread {
    id: u32,
    thread: JoinHandle<()>,
    commands: Sender<Command>,
    /// Disconnected when the thread is at its end.
    ended: Receiver<()>,
}

impl VcpuThread {
    /// The number of the vCPU.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Has the vCPU leave the guest and say its number then. Nothing is waited for.
    pub fn pause(&self, paused: Sender<u32>) {
        self.tell(Command::Pause(paused));
    }

    /// Lets a paused vCPU continue.
    pub fn resume(&self) {
        self.tell(Command::Resume);
    }

    /// Asks a paused vCPU for its state. One that is not paused does not answer.
    pub fn save(&self, state: Sender<Box<VcpuState>>) {
        self.tell(Command::Save(state));
    }

    fn tell(&self, command: Command) {
        // Full: the vCPU does not look, and the thread that waits for an answer notices. Disconnected: the vCPU has
        // ended.
        drop(self.commands.try_send(command));
        signal::kick(&self.thread);
    }

    /// Stops vCPUs and waits for their threads. Returns those that do not stop in time; they run no guest code any
    /// more once the end of the machine was reported.
    pub fn stop_all(threads: Vec<Self>, deadline: Instant) -> Vec<Self> {
        for thread in &threads {
            thread.tell(Command::Stop);
        }
        let mut late = Vec::new();
        'threads: for vcpu in threads {
            while let Err(RecvTimeoutError::Timeout) = vcpu.ended.recv_timeout(KICK_INTERVAL) {
                if Instant::now() > deadline {
                    late.push(vcpu);
                    continue 'threads;
                }
                vcpu.tell(Command::Stop);
            }
            // A panic was reported as an event already.
            drop(vcpu.thread.join());
        }
        late
    }
}

/// The working state of a vCPU's thread.
struct Runner {
    id: u32,
    /// Keeps the memory mapped for as long as the guest may run.
    vm: Arc<Vm>,
    buses: Arc<Buses>,
    events: Events,
    commands: Receiver<Command>,
}

impl Runner {
    fn run(self, mut vcpu: VcpuFd, page: RunPage) {
        let _guard = PanicGuard { id: self.id, events: &self.events };
        let mut armed = Armed::new(page);
        loop {
            armed.clear();
            match self.commands.try_recv() {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
                Ok(Command::Pause(paused)) => {
                    if !self.stay_paused(&mut vcpu, &mut armed, paused) {
                        return;
                    }
                }
                // It is not paused.
                Ok(Command::Resume | Command::Save(_)) => {}
                Err(TryRecvError::Empty) => {}
            }
            if self.events.has_ended() {
                // The guest is not run on; `Stop` is on its way.
                while !matches!(self.commands.recv(), Ok(Command::Stop) | Err(_)) {}
                return;
            }
            if let Err(ending) = self.run_guest(&mut vcpu, armed.page()) {
                self.events.end(ending);
            }
        }
    }

    /// Stays outside of the guest until it may continue. Returns whether it may.
    fn stay_paused(&self, vcpu: &mut VcpuFd, armed: &mut Armed, paused: Sender<u32>) -> bool {
        // The data that the last exit has read reaches the guest's registers only with the next KVM_RUN, which
        // returns at once.
        armed.raise();
        drop(vcpu.run());
        armed.clear();
        // The requester may have stopped waiting.
        let _ = paused.send(self.id);
        drop(paused);
        loop {
            match self.commands.recv() {
                Ok(Command::Resume) => return true,
                Ok(Command::Pause(paused)) => {
                    let _ = paused.send(self.id);
                }
                Ok(Command::Save(state)) => self.save(vcpu, &state),
                Ok(Command::Stop) | Err(_) => return false,
            }
        }
    }

    /// Answers with the state of the vCPU.
    // Inlined, its 28 KiB of stack would belong to the loop that runs the guest, and so to the memory of each vCPU.
    #[inline(never)]
    fn save(&self, vcpu: &VcpuFd, state: &Sender<Box<VcpuState>>) {
        match self.vm.saved_msrs().and_then(|msrs| VcpuState::of(self.id, vcpu, msrs)) {
            Ok(saved) => drop(state.send(Box::new(saved))),
            // The sender is dropped, which tells the requester that there is no state.
            Err(error) => warn!(vcpu = self.id, %error, "its state can't be read"),
        }
    }

    /// Runs the guest until a signal, or until the machine is at its end.
    fn run_guest(&self, vcpu: &mut VcpuFd, page: &mut RunPage) -> Result<(), Ending> {
        while !self.events.has_ended() {
            match vcpu.run() {
                Ok(VcpuExit::MmioRead(address, data)) => self.buses.mmio.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.buses.mmio.write(address, data),
                Ok(VcpuExit::IoIn(port, _) | VcpuExit::IoOut(port, _)) => self.port_io(page, port)?,
                Ok(VcpuExit::Hlt | VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => {
                    return Err(Ending::TripleFault { vcpu: self.id, place: place(vcpu) });
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Err(Ending::PowerOff),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Err(Ending::Reset),
                Ok(VcpuExit::InternalError) => return Err(Ending::GuestCrash(self.internal_error(vcpu, page))),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return Err(Ending::HostFailure(format!(
                        "vCPU {}: the CPU refused to enter the guest (reason {reason:#x}, host CPU {cpu})",
                        self.id
                    )));
                }
                Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                    return Err(Ending::HostFailure(format!(
                        "vCPU {}: the host has no memory behind guest address {gpa:#x} ({size} bytes)",
                        self.id
                    )));
                }
                Ok(exit) => {
                    return Err(Ending::GuestCrash(format!("vCPU {}: KVM stopped it with {exit:?}", self.id)));
                }
                Err(error) => match error.errno() {
                    libc::EINTR => return Ok(()),
                    // A vCPU that waits for its SIPI was woken without one.
                    libc::EAGAIN => {}
                    _ => {
                        return Err(Ending::HostFailure(format!(
                            "vCPU {}: running the guest: {}",
                            self.id,
                            io::Error::from(error)
                        )));
                    }
                },
            }
        }
        Ok(())
    }

    fn port_io(&self, page: &mut RunPage, port: u16) -> Result<(), Ending> {
        let Some(io) = page.port_io() else {
            return Err(Ending::HostFailure(format!("vCPU {}: KVM has port I/O outside of what it shares", self.id)));
        };
        for element in io.data.chunks_exact_mut(io.size) {
            if io.is_in {
                self.buses.pio.read(u64::from(port), element);
            } else {
                self.buses.pio.write(u64::from(port), element);
            }
        }
        Ok(())
    }

    fn internal_error(&self, vcpu: &VcpuFd, page: &RunPage) -> String {
        let suberror = page.internal_error();
        let what = match suberror {
            1 => "met an instruction it can't emulate",
            2 => "was interrupted in delivering an exception",
            3 => "met an unexpected exit while delivering an event",
            _ => "failed inside",
        };
        format!("vCPU {}: KVM {what} (suberror {suberror}) at {}", self.id, place(vcpu))
    }
}

/// Where a vCPU is, for a person.
fn place(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "rip {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            regs.rip, regs.rsp, regs.rflags, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer
        ),
        _ => "an unknown place".into(),
    }
}

struct PanicGuard<'a> {
    id: u32,
    events: &'a Events,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.events.end(Ending::Panic(format!("the thread of vCPU {} panicked", self.id)));
        }
    }
}
