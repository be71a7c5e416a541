//! What drives a device: PCI, the virtio transport and its queues, disks and NICs, and waiting for them.

pub mod blk;
pub mod doze;
pub mod net;
pub mod pci;
pub mod queue;
pub mod single;
pub mod virtio;
pub mod wait;
