//! RingVM's device backends: whatever serves a virtqueue, wherever it runs.
//!
//! Nothing here knows of KVM, PCI or vhost-user. A transport hands a [`device::Device`] the parts of a queue
//! ([`device::QueueParts`]); from there a request goes
//! doorbell → [`reactor`] → [`worker`] → [`queue`] → [`block`] → [`storage`] → [`ring`] and back, on one I/O thread.

pub mod block;
pub mod device;
pub mod driver;
pub mod guest_io;
pub mod interrupt;
pub mod queue;
mod queues;
pub mod reactor;
pub mod ring;
pub mod rng;
pub mod stats;
pub mod storage;
pub mod worker;
