//! The signal that breaks KVM_RUN.
//!
//! Its handler only sets `immediate_exit` of the vCPU that the interrupted thread runs. If the signal comes while the
//! thread is outside of KVM_RUN, the next KVM_RUN returns at once, so no signal is ever lost.
#![allow(unsafe_code, reason = "a signal handler that writes to the mapped kvm_run")]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use std::os::unix::thread::JoinHandleExt;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::run_page::RunPage;

thread_local! {
    /// `immediate_exit` of the vCPU of this thread. Constant, without a destructor: a handler may look at it any time.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// Installs the handler, once per process.
pub(super) fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), kicked).map_err(|error| error.errno()))
        .map_err(io::Error::from_raw_os_error)
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is into the mapping that this very thread holds (see `Armed`).
        unsafe { &*flag }.store(1, Ordering::SeqCst);
    }
}

/// The page shared with the kernel and with the handler of signals that stop this thread. Disarms when dropped, and
/// owns the mapping so that it can't be gone before.
pub(super) struct Armed {
    page: RunPage,
}

impl Armed {
    /// Makes signals to this thread stop the vCPU of `page`.
    pub(super) fn new(page: RunPage) -> Self {
        IMMEDIATE_EXIT.set(page.immediate_exit());
        Self { page }
    }

    /// Has the next KVM_RUN return at once.
    pub(super) fn raise(&self) {
        // SAFETY: the mapping is there as long as `self`.
        unsafe { &*self.page.immediate_exit() }.store(1, Ordering::SeqCst);
    }

    /// Lets the vCPU run again. Look for commands after this, not before.
    pub(super) fn clear(&self) {
        // SAFETY: the mapping is there as long as `self`.
        unsafe { &*self.page.immediate_exit() }.store(0, Ordering::SeqCst);
    }

    /// The page shared with the kernel.
    pub(super) fn page(&mut self) -> &mut RunPage {
        &mut self.page
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

/// Breaks the thread out of KVM_RUN.
pub(super) fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that was not joined has a valid pthread_t, even after its end (glibc 2.34 and later, musl).
    unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, SIGRTMIN()) };
}
