//! PCI: one root bus, without bridges (PCI Local Bus 3.0; ECAM as in PCI Express 5.0, 7.2.2).

mod bar;
mod config;
mod host_bridge;
mod msix;
mod root;

pub use bar::{Bar, BarWindow};
pub use config::{COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_MEMORY, ConfigSpace, Identity, reg};
pub use host_bridge::HostBridge;
pub use msix::Msix;
pub use root::{Bdf, ConfigPorts, Ecam, PciBus, PciError, SLOTS, SharedFunction};

/// One function of the bus: the target of configuration cycles.
pub trait PciFunction: Send {
    /// Reads configuration space. The access lies within one of its 1024 dwords.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);

    /// Writes configuration space. The access lies within one of its 1024 dwords.
    fn write_config(&mut self, offset: u16, data: &[u8]);
}
