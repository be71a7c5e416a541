//! The machine: from a configuration and devices to running vCPUs, and back. Devices come and go while it runs.
//!
//! Devices outlive the machine. A reboot stops it, takes its devices back, reset, and builds the next one around them, so
//! a disk keeps its lock and its statistics.

pub mod ending;
pub mod memory;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, bounded};
use ringvm_backends::device::{Device, GuestMemory};
use ringvm_backends::stats::DeviceStats;
use thiserror::Error;
use tracing::info;
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use crate::advice::advice;
use crate::arch::x86_64::layout::{
    AddressMap, ECAM, LayoutError, MMIO32, PORT_ACPI, PORT_CMOS, PORT_COM1, PORT_I8042, PORT_PCI, PORT_POST,
};
use crate::boot::{self, BootError, BootSource};
use crate::bus::{BusError, Buses, Handler};
use crate::config::{CpuConfig, MemoryConfig};
use crate::console::Console;
use crate::events::Events;
use crate::kvm::{Kvm, KvmError, VcpuThread, Vcpus, Vm};
use crate::legacy::acpi::{AcpiRegisters, PostPort};
use crate::legacy::i8042::I8042;
use crate::legacy::rtc::Rtc;
use crate::legacy::serial::SerialPort;
use crate::owner::{Questions, Taken};
use crate::pci::{BarWindow, Bdf, ConfigPorts, Ecam, HostBridge, PciBus, PciError};
use crate::platform::Platform;
use crate::virtio_pci::{self, BAR_SIZE, Place, VirtioPci};
use memory::MemoryError;

/// A machine can't be built or stopped.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The size of memory does not fit.
    #[error("--memory: {0}")]
    Layout(#[from] LayoutError),
    /// Memory can't be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel can't be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Two things at one address: a bug of ours.
    #[error("assembling the machine: {0}")]
    Bus(#[from] BusError),
    /// More devices than slots.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// No address is left for a device's registers.
    #[error("{what}: finding an address for its registers: {source}")]
    Addresses {
        /// The device.
        what: String,
        /// What came back.
        source: vm_allocator::Error,
    },
    /// Names are unique.
    #[error("{0}: there is a device of that name already; choose another id")]
    Attached(String),
    /// Nothing has that name.
    #[error("{0}: there is no such device")]
    NoDevice(String),
    /// The host ran out of something.
    #[error("{what}: {source}{}", advice(.source))]
    Host {
        /// What was tried.
        what: String,
        /// What came back.
        source: io::Error,
    },
}

/// The parts of a machine besides its devices. The same for every reboot.
pub struct Blueprint<'a> {
    /// KVM.
    pub kvm: &'a Kvm,
    /// vCPUs.
    pub cpus: CpuConfig,
    /// Memory.
    pub memory: &'a MemoryConfig,
    /// The kernel to boot.
    pub boot: BootSource<'a>,
    /// The other end of the serial port.
    pub console: Option<&'a Console>,
    /// Where the end of the machine is reported.
    pub events: &'a Events,
}

/// A machine whose vCPUs do not run.
pub struct Machine {
    vcpus: Vcpus,
    board: Board,
    events: Events,
}

impl Machine {
    /// Builds a machine around `devices`, and takes them once it has all that the host may lack: memory, a VM and vCPUs.
    ///
    /// # Errors
    /// For the first thing that can't be; nothing of the machine is left then.
    pub fn build(blueprint: &Blueprint<'_>, devices: &mut Vec<Box<dyn Device>>) -> Result<Self, MachineError> {
        let map = AddressMap::new(blueprint.memory.size, blueprint.memory.page(), blueprint.kvm.physical_bits())?;
        let memory = memory::allocate(blueprint.memory, &map.ram)?;
        let tables = boot::Platform { cpus: blueprint.cpus.count, serial: true };
        let entry = boot::load(&blueprint.boot, &memory, &map, &tables)?;
        let vm = Arc::new(Vm::new(blueprint.kvm, Arc::clone(&memory))?);
        let vcpus = Vcpus::new(blueprint.kvm, &vm, blueprint.cpus, entry)?;
        let board = Board::new(vm, memory, &map)?;
        for device in devices.drain(..) {
            board.attach(device)?;
        }
        let serial = SerialPort::new(blueprint.console, board.platform.as_ref())
            .map_err(|source| MachineError::Host { what: "wiring the serial port".into(), source })?;
        let events = blueprint.events;
        let ports: [(_, Handler); 6] = [
            (PORT_PCI, Arc::new(Mutex::new(ConfigPorts::new(Arc::clone(&board.pci))))),
            (PORT_COM1, serial),
            (PORT_CMOS, Arc::new(Mutex::new(Rtc::default()))),
            (PORT_I8042, Arc::new(Mutex::new(I8042::new(events.clone())))),
            (PORT_POST, Arc::new(Mutex::new(PostPort))),
            (PORT_ACPI, Arc::new(Mutex::new(AcpiRegisters::new(events.clone())))),
        ];
        let buses = &board.buses;
        for (range, handler) in ports {
            buses.pio.insert(range.start, range.end - range.start, handler)?;
        }
        let ecam = Ecam::new(Arc::clone(&board.pci));
        buses.mmio.insert(ECAM.start, ECAM.end - ECAM.start, Arc::new(Mutex::new(ecam)))?;
        info!(
            cpus = blueprint.cpus.count,
            memory = blueprint.memory.size,
            ?entry,
            devices = board.lock().len(),
            "machine built"
        );
        Ok(Self { vcpus, board, events: events.clone() })
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(self) -> Result<Running, MachineError> {
        let threads = self.vcpus.start(&self.board.buses, &self.events)?;
        Ok(Running { threads, board: self.board })
    }
}

/// A machine whose guest runs.
pub struct Running {
    threads: Vec<VcpuThread>,
    board: Board,
}

/// A question to a device, which will answer in its own time.
pub struct Asked {
    /// Name of the device.
    pub name: String,
    /// Brings its statistics. Disconnected if the device was taken away in the meantime.
    pub answer: Receiver<DeviceStats>,
}

impl Running {
    /// Asks every device for its statistics, in the order of their slots.
    #[must_use]
    pub fn ask_statistics(&self) -> Vec<Asked> {
        let ask = |function: &Function| {
            let (reply, answer) = bounded(1);
            function.questions.stats(reply);
            Asked { name: function.name.clone(), answer }
        };
        self.board.lock().values().map(ask).collect()
    }

    /// Attaches a device: the guest finds it the next time it looks at the bus.
    ///
    /// # Errors
    /// When there is one of that name, no slot or address is left, or the host has run out of something. The device is gone then.
    pub fn attach(&self, device: Box<dyn Device>) -> Result<Bdf, MachineError> {
        self.board.attach(device)
    }

    /// Detaches the device of this name: the guest no longer finds it. Its requests in flight are cancelled, or
    /// waited for; the device comes over the channel once they have ended.
    ///
    /// # Errors
    /// When there is no device of that name.
    pub fn detach(&self, name: &str) -> Result<Receiver<Taken>, MachineError> {
        self.board.detach(name)
    }

    /// How many interrupt routes the devices have.
    #[must_use]
    pub fn interrupt_routes(&self) -> usize {
        self.board.vm.routes()
    }

    /// The vCPUs, to pause and to look at.
    #[must_use]
    pub fn vcpus(&self) -> &[VcpuThread] {
        &self.threads
    }
}

/// The parts of a machine that its devices are attached to.
struct Board {
    vm: Arc<Vm>,
    platform: Arc<dyn Platform>,
    memory: GuestMemory,
    buses: Arc<Buses>,
    pci: Arc<PciBus>,
    /// Where the addresses of BARs come from, before any software moves them.
    bars: Mutex<AddressAllocator>,
    /// Where software may move them.
    window: BarWindow,
    functions: Mutex<BTreeMap<Bdf, Function>>,
}

/// A device on the PCI bus.
struct Function {
    name: String,
    function: Arc<Mutex<VirtioPci>>,
    questions: Questions,
    bar: RangeInclusive,
}

impl Board {
    fn new(vm: Arc<Vm>, memory: GuestMemory, map: &AddressMap) -> Result<Self, MachineError> {
        let pci = Arc::new(PciBus::default());
        pci.insert(pci.claim()?, Arc::new(Mutex::new(HostBridge::default())));
        let size = map.mmio64.end - map.mmio64.start;
        let bars = AddressAllocator::new(map.mmio64.start, size)
            .map_err(|error| MachineError::Addresses { what: "the PCI bus".into(), source: error })?;
        Ok(Self {
            platform: Arc::clone(&vm) as _,
            vm,
            memory,
            buses: Arc::default(),
            pci,
            bars: Mutex::new(bars),
            window: BarWindow::new(&[MMIO32, map.mmio64.clone()]),
            functions: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Bdf, Function>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bars(&self) -> MutexGuard<'_, AddressAllocator> {
        self.bars.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach(&self, device: Box<dyn Device>) -> Result<Bdf, MachineError> {
        let name = device.info().name.clone();
        let mut functions = self.lock();
        if functions.values().any(|function| function.name == name) {
            return Err(MachineError::Attached(name));
        }
        let bdf = self.pci.claim()?;
        let placed = self.place(device, bdf.slot, name);
        match placed {
            Ok(function) => {
                // The function is complete before the guest can find it.
                self.pci.insert(bdf, Arc::clone(&function.function) as _);
                functions.insert(bdf, function);
                Ok(bdf)
            }
            Err(error) => {
                self.pci.remove(bdf);
                Err(error)
            }
        }
    }

    fn place(&self, device: Box<dyn Device>, slot: u8, name: String) -> Result<Function, MachineError> {
        let bar = self.bars().allocate(BAR_SIZE, BAR_SIZE, AllocPolicy::FirstMatch);
        let bar = bar.map_err(|source| MachineError::Addresses { what: name.clone(), source })?;
        let place = Place { slot, bar: bar.start(), window: self.window.clone(), patience: virtio_pci::PATIENCE };
        match VirtioPci::new(device, Arc::clone(&self.memory), place, &self.buses, &self.platform) {
            Ok(function) => {
                let questions = virtio_pci::lock(&function).questions();
                Ok(Function { name, function, questions, bar })
            }
            Err(source) => {
                // It was allocated just now.
                let _ = self.bars().free(&bar);
                Err(MachineError::Host { what: format!("{name}: putting it on the PCI bus"), source })
            }
        }
    }

    fn detach(&self, name: &str) -> Result<Receiver<Taken>, MachineError> {
        let mut functions = self.lock();
        let found = functions.iter().find(|(_, function)| function.name == name).map(|(bdf, _)| *bdf);
        let Some((bdf, function)) = found.and_then(|bdf| Some((bdf, functions.remove(&bdf)?))) else {
            return Err(MachineError::NoDevice(name.to_owned()));
        };
        self.pci.remove(bdf);
        virtio_pci::lock(&function.function).unplug();
        // It was allocated when the device came.
        let _ = self.bars().free(&function.bar);
        Ok(function.questions.take())
    }
}
