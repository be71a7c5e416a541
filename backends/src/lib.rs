//! RingVM's device backends: whatever serves a virtqueue, wherever it runs.
//!
//! Nothing here knows of KVM, PCI or vhost-user. A transport hands a [`device::Device`] the parts of a queue
//! ([`device::QueueParts`]); from there a request goes
//! doorbell → [`reactor`] → [`worker`] → [`queue`] → [`block`] → [`storage`] → [`ring`] and back, on one I/O thread.

mod afterlife;
pub mod block;
pub mod bound;
pub mod device;
pub mod dirty;
pub mod driver;
pub mod event;
pub mod guest_io;
pub mod histogram;
pub mod inflight;
pub mod inherited;
pub mod interrupt;
pub mod io;
pub mod keyval;
pub mod net;
pub mod pipe;
pub mod port;
pub mod program;
pub mod queue;
mod queues;
pub mod reactor;
pub mod receiver;
pub mod replay;
pub mod ring;
pub mod rng;
pub mod service;
pub mod setup;
pub mod shared;
pub mod state;
pub mod stats;
pub mod storage;
pub mod summary;
pub mod worker;

/// Where tests put images: beside the test binary, on a disk. The usual directory for such files may be a tmpfs, where
/// O_DIRECT, holes and io_uring behave otherwise.
#[cfg(test)]
fn scratch_dir() -> std::path::PathBuf {
    let exe = std::env::current_exe().expect("a test knows where it runs");
    exe.parent().expect("an executable is in a directory").to_owned()
}
