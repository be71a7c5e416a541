//! Interrupts: GSI routes, MSI-X vectors as irqfds, shared level lines.
//!
//! An MSI-X vector is one eventfd for its whole life. While it is unmasked that eventfd is an irqfd, so a device's
//! signal reaches the guest without a thread of ours. While it is masked the irqfd is taken off, and signals stay in
//! the eventfd: that is the pending bit, and the kernel delivers it when the irqfd is put on again.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use tracing::warn;
use vm_allocator::IdAllocator;
use vmm_sys_util::eventfd::EventFd;

use crate::platform::{IrqLine, MsiMessage, MsiRoute};

/// Pins of the I/O APIC; their GSIs are their numbers.
const IOAPIC_PINS: u32 = 24;
/// GSIs that KVM can route (KVM_MAX_IRQ_ROUTES).
const MAX_GSI: u32 = 4096;

/// The interrupt routes of a VM.
pub(super) struct Irqs {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

struct Table {
    /// GSIs for MSI routes.
    gsis: IdAllocator,
    /// GSIs handed out to MSI routes, with their message once they have one.
    msi: BTreeMap<u32, Option<MsiMessage>>,
    /// Number of holders that assert each line.
    asserted: BTreeMap<u32, u32>,
}

impl Irqs {
    /// The routes of `vm`, which has an in-kernel irqchip. Only the I/O APIC is wired: hardware-reduced ACPI has no
    /// PICs.
    pub(super) fn new(vm: Arc<VmFd>) -> io::Result<Arc<Self>> {
        let gsis = IdAllocator::new(IOAPIC_PINS, MAX_GSI - 1).map_err(io::Error::other)?;
        let table = Table { gsis, msi: BTreeMap::new(), asserted: BTreeMap::new() };
        let irqs = Arc::new(Self { vm, table: Mutex::new(table) });
        irqs.write(&irqs.lock())?;
        Ok(irqs)
    }

    /// A new MSI route.
    pub(super) fn msi(self: &Arc<Self>) -> io::Result<Box<dyn MsiRoute>> {
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let mut table = self.lock();
        let gsi = table
            .gsis
            .allocate_id()
            .map_err(|_| io::Error::other("all interrupt routes of KVM are in use; give the devices fewer queues"))?;
        table.msi.insert(gsi, None);
        Ok(Box::new(Route { irqs: Arc::clone(self), gsi, event, attached: false }))
    }

    /// How many MSI routes there are.
    pub(super) fn routes(&self) -> usize {
        self.lock().msi.len()
    }

    /// A new holder of line `gsi`.
    pub(super) fn line(self: &Arc<Self>, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(Line { irqs: Arc::clone(self), gsi, asserted: Mutex::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives KVM the whole table: there is no call for one route.
    fn write(&self, table: &Table) -> io::Result<()> {
        let pins = (0..IOAPIC_PINS).map(|pin| kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
            },
            ..Default::default()
        });
        let messages = table.msi.iter().filter_map(|(&gsi, message)| {
            let message = (*message)?;
            Some(kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: message.address as u32,
                        address_hi: (message.address >> 32) as u32,
                        data: message.data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            })
        });
        let entries: Vec<_> = pins.chain(messages).collect();
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::other("too many interrupt routes"))?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }
}

struct Route {
    irqs: Arc<Irqs>,
    gsi: u32,
    event: Arc<EventFd>,
    attached: bool,
}

impl Route {
    fn detach(&mut self) -> io::Result<()> {
        if self.attached {
            self.irqs.vm.unregister_irqfd(&self.event, self.gsi)?;
            self.attached = false;
        }
        Ok(())
    }
}

impl MsiRoute for Route {
    fn event(&self) -> Arc<EventFd> {
        Arc::clone(&self.event)
    }

    fn set(&mut self, message: Option<MsiMessage>) -> io::Result<()> {
        let Some(message) = message else { return self.detach() };
        {
            let mut table = self.irqs.lock();
            let before = table.msi.insert(self.gsi, Some(message));
            if before != Some(Some(message))
                && let Err(error) = self.irqs.write(&table)
            {
                table.msi.insert(self.gsi, before.flatten());
                drop(table);
                self.detach()?;
                return Err(error);
            }
        }
        if !self.attached {
            self.irqs.vm.register_irqfd(&self.event, self.gsi)?;
            self.attached = true;
        }
        Ok(())
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            warn!(gsi = self.gsi, %error, "taking an irqfd off");
        }
        // The stale route in KVM's table leads nowhere without an irqfd; the next change of the table takes it out.
        let mut table = self.irqs.lock();
        table.msi.remove(&self.gsi);
        // It was allocated, so it can be freed.
        let _ = table.gsis.free_id(self.gsi);
    }
}

struct Line {
    irqs: Arc<Irqs>,
    gsi: u32,
    asserted: Mutex<bool>,
}

impl IrqLine for Line {
    fn set(&self, asserted: bool) {
        let mut mine = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        if *mine == asserted {
            return;
        }
        *mine = asserted;
        // The table stays locked over the call, so that two holders can't overtake each other.
        let mut table = self.irqs.lock();
        let holders = table.asserted.entry(self.gsi).or_default();
        let (before, after) = (*holders, if asserted { *holders + 1 } else { *holders - 1 });
        *holders = after;
        if (before == 0) != (after == 0)
            && let Err(error) = self.irqs.vm.set_irq_line(self.gsi, after != 0)
        {
            warn!(gsi = self.gsi, error = %io::Error::from(error), "driving an interrupt line");
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set(false);
    }
}
