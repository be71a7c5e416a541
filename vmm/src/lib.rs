//! RingVM: an event-driven virtual machine monitor for Linux/KVM.
//!
//! vCPU threads run the guest and hand its exits to the [`bus`]. The I/O threads of `ringvm_backends` serve its
//! virtqueues; a doorbell reaches them without leaving the kernel. This crate is the machine around that.

pub mod advice;
pub mod arch;
pub mod boot;
pub mod bus;
pub mod bus_error;
pub mod check;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod events;
pub mod exit;
pub mod kvm;
pub mod legacy;
pub mod machine;
pub mod operator;
pub mod owner;
pub mod pci;
pub mod placement;
pub mod platform;
pub mod run;
pub mod signals;
pub mod vhost_user;
pub mod virtio_pci;
