//! RingVM's device backends: the code that serves virtqueues, in whichever process it runs.
//!
//! Nothing here knows of KVM, PCI or vhost-user. A transport hands a [`device::Device`] the parts of a queue
//! ([`device::QueueParts`]). From there a request goes doorbell → [`io::reactor`] → [`io::worker`] →
//! [`virtqueue::split`] → [`block`] → [`block::storage`] → [`io::ring`] and back, on one I/O thread.

pub mod block;
pub mod device;
pub mod host;
pub mod io;
pub mod net;
pub mod options;
pub mod rng;
pub mod setup;
pub mod state;
pub mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod trace;
pub mod virtqueue;

/// Where tests put images: next to the test binary, on a disk. The usual directory for such files may be a tmpfs,
/// where O_DIRECT, holes and io_uring behave differently.
#[cfg(test)]
fn scratch_dir() -> std::path::PathBuf {
    let exe = std::env::current_exe().expect("a test knows where it runs");
    exe.parent().expect("an executable is in a directory").to_owned()
}
