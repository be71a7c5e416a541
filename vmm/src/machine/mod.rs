//! The machine: from a configuration and devices to running vCPUs, and back.
//!
//! Devices outlive the machine. A reboot stops it, takes its devices back, reset, and builds the next one around them, so
//! a disk keeps its lock and its statistics.

pub mod ending;
pub mod layout;
pub mod memory;

use std::io;
use std::sync::{Arc, Mutex};

use ringvm_backends::device::Device;
use ringvm_backends::stats::DeviceStats;
use thiserror::Error;
use tracing::info;

use crate::advice::advice;
use crate::boot::{self, BootError, BootSource, acpi};
use crate::bus::{BusError, Buses, Handler};
use crate::config::{CpuConfig, MemoryConfig};
use crate::events::Events;
use crate::kvm::{Kvm, KvmError, VcpuThread, Vcpus, Vm};
use crate::legacy::acpi::{AcpiRegisters, PostPort};
use crate::legacy::console::Console;
use crate::legacy::i8042::I8042;
use crate::legacy::rtc::Rtc;
use crate::legacy::serial::SerialPort;
use crate::pci::{BarWindow, ConfigPorts, Ecam, HostBridge, PciBus, PciError};
use crate::platform::Platform;
use crate::virtio_pci::{self, BAR_SIZE, Place, VirtioPci};
use ending::Functions;
use layout::{AddressMap, ECAM, LayoutError, MMIO32, PORT_ACPI, PORT_CMOS, PORT_COM1, PORT_I8042, PORT_PCI, PORT_POST};
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
    /// The host ran out of something.
    #[error("{what}: {source}{}", advice(.source))]
    Host {
        /// What was tried.
        what: String,
        /// What came back.
        source: io::Error,
    },
}

/// What a machine is made of, beside its devices. The same for every reboot.
pub struct Blueprint<'a> {
    /// KVM.
    pub kvm: &'a Kvm,
    /// vCPUs.
    pub cpus: CpuConfig,
    /// Memory.
    pub memory: &'a MemoryConfig,
    /// What to boot.
    pub boot: BootSource<'a>,
    /// The other end of the serial port.
    pub console: Option<&'a Console>,
    /// Where the end of the machine is reported.
    pub events: &'a Events,
}

/// A machine whose vCPUs do not run.
pub struct Machine {
    vcpus: Vcpus,
    buses: Arc<Buses>,
    functions: Functions,
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
        let tables = acpi::Platform { cpus: blueprint.cpus.count, serial: true };
        let entry = boot::load(&blueprint.boot, &memory, &map, &tables)?;
        let vm = Arc::new(Vm::new(blueprint.kvm, Arc::clone(&memory))?);
        let vcpus = Vcpus::new(blueprint.kvm, &vm, blueprint.cpus, entry)?;
        let platform: Arc<dyn Platform> = vm;
        let buses = Arc::new(Buses::default());

        let mut pci = PciBus::default();
        pci.insert(pci.free_slot()?, Arc::new(Mutex::new(HostBridge::default())));
        let window = BarWindow::new(&[MMIO32, map.mmio64.clone()]);
        let mut functions = Vec::with_capacity(devices.len());
        for (device, bar) in devices.drain(..).zip((map.mmio64.start..).step_by(BAR_SIZE as usize)) {
            let slot = pci.free_slot()?;
            let name = device.info().name.clone();
            let place = Place { slot, bar, window: window.clone() };
            let function = VirtioPci::new(device, Arc::clone(&memory), place, &buses, &platform)
                .map_err(|source| MachineError::Host { what: format!("{name}: putting it on the PCI bus"), source })?;
            pci.insert(slot, Arc::clone(&function) as _);
            functions.push((name, function));
        }
        let pci = Arc::new(pci);

        let serial = SerialPort::new(blueprint.console, platform.as_ref())
            .map_err(|source| MachineError::Host { what: "wiring the serial port".into(), source })?;
        let events = blueprint.events;
        let ports: [(_, Handler); 6] = [
            (PORT_PCI, Arc::new(Mutex::new(ConfigPorts::new(Arc::clone(&pci))))),
            (PORT_COM1, serial),
            (PORT_CMOS, Arc::new(Mutex::new(Rtc::default()))),
            (PORT_I8042, Arc::new(Mutex::new(I8042::new(events.clone())))),
            (PORT_POST, Arc::new(Mutex::new(PostPort))),
            (PORT_ACPI, Arc::new(Mutex::new(AcpiRegisters::new(events.clone())))),
        ];
        for (range, handler) in ports {
            buses.pio.insert(range.start, range.end - range.start, handler)?;
        }
        buses.mmio.insert(ECAM.start, ECAM.end - ECAM.start, Arc::new(Mutex::new(Ecam::new(pci))))?;
        info!(
            cpus = blueprint.cpus.count,
            memory = blueprint.memory.size,
            ?entry,
            devices = functions.len(),
            "machine built"
        );
        Ok(Self { vcpus, buses, functions, events: events.clone() })
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(self) -> Result<Running, MachineError> {
        let threads = self.vcpus.start(&self.buses, &self.events)?;
        Ok(Running { threads, functions: self.functions })
    }
}

/// A machine whose guest runs.
pub struct Running {
    threads: Vec<VcpuThread>,
    functions: Functions,
}

/// Asks a machine's devices for their statistics, from any thread. A device that drains keeps it waiting.
#[derive(Clone)]
pub struct Statistics(Functions);

impl Statistics {
    /// What every device has done, in the order of their slots.
    #[must_use]
    pub fn collect(&self) -> Vec<DeviceStats> {
        self.0.iter().map(|(_, function)| virtio_pci::lock(function).stats()).collect()
    }
}

impl Running {
    /// A handle on the devices' statistics.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        Statistics(self.functions.clone())
    }
}
