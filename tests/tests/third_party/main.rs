//! Other people's vhost-user clients over our daemons, all from Debian's packages: QEMU with a stock Debian guest under TCG and
//! DPDK's virtio-user, while daemons of disks and NICs are killed and started again, and User Mode Linux.

mod bios;
mod blk;
mod console;
mod dpdk;
mod net;
mod network;
mod qemu;
mod served;
mod uml;
mod vsock;

use std::fmt::Display;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Each of these tests keeps two CPUs busy: they run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory for sockets and images, on a disk: tmpfs behaves otherwise under io_uring.
fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("3p").tempdir_in(ringvm_tests::paths::target()).expect("a directory for files")
}

/// What went well; anything else fails the test with its one line.
#[track_caller]
fn ok<T, E: Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|e| panic!("{e}"))
}
