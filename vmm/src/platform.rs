//! The devices' interface to the hypervisor, so that only `kvm/` sees KVM and tests need none.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt: the data it writes and the address it writes to (PCI 3.0, 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// The 64-bit message address.
    pub address: u64,
    /// The message data.
    pub data: u32,
}

/// The way of one MSI-X vector into the guest.
///
/// While no message is set the way is closed, and what was signalled stays in the event: that is the vector's pending bit.
pub trait MsiRoute: Send {
    /// The event that the device signals. The same event for as long as the route lives.
    fn event(&self) -> Arc<EventFd>;

    /// Opens the way with `message`, delivering what is pending, or closes it with `None`.
    ///
    /// # Errors
    /// When the hypervisor refuses the route; it is closed then.
    fn set(&mut self, message: Option<MsiMessage>) -> io::Result<()>;
}

/// A level-triggered interrupt line. Lines of one number may be shared: the wire is the OR of its holders.
pub trait IrqLine: Send + Sync {
    /// Drives the line of this holder.
    fn set(&self, asserted: bool);
}

/// The hypervisor as seen by a device.
pub trait Platform: Send + Sync {
    /// A new, closed MSI-X route.
    ///
    /// # Errors
    /// When routes or file descriptors have run out.
    fn msi(&self) -> io::Result<Box<dyn MsiRoute>>;

    /// A new holder of interrupt line `gsi`.
    fn line(&self, gsi: u32) -> Arc<dyn IrqLine>;

    /// A new event each write to which is an edge on interrupt line `gsi`.
    ///
    /// # Errors
    /// When file descriptors have run out or the hypervisor refuses it.
    fn edge(&self, gsi: u32) -> io::Result<EventFd>;

    /// Makes guest writes of any size to the guest-physical `address` signal `event` without leaving the kernel.
    ///
    /// # Errors
    /// When the hypervisor refuses it.
    fn attach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`Platform::attach_doorbell`].
    ///
    /// # Errors
    /// When there was no such doorbell.
    fn detach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

#[cfg(test)]
pub(crate) mod fake {
    //! A platform without a hypervisor that remembers what it was told.

    use std::collections::BTreeMap;
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// See the module.
    #[derive(Default)]
    pub(crate) struct FakePlatform {
        /// Attached doorbells: address to descriptor.
        pub(crate) doorbells: Mutex<BTreeMap<u64, i32>>,
        /// The latest message of each route, in the order of creation.
        pub(crate) routes: Arc<Mutex<Vec<Option<MsiMessage>>>>,
        /// Level of the one line that is told apart.
        pub(crate) line: Arc<FakeLine>,
    }

    /// The level of a line.
    #[derive(Default)]
    pub(crate) struct FakeLine(pub(crate) AtomicBool);

    impl IrqLine for FakeLine {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::SeqCst);
        }
    }

    struct FakeRoute {
        index: usize,
        event: Arc<EventFd>,
        routes: Arc<Mutex<Vec<Option<MsiMessage>>>>,
    }

    impl MsiRoute for FakeRoute {
        fn event(&self) -> Arc<EventFd> {
            Arc::clone(&self.event)
        }

        fn set(&mut self, message: Option<MsiMessage>) -> io::Result<()> {
            self.routes.lock().unwrap()[self.index] = message;
            Ok(())
        }
    }

    impl Platform for FakePlatform {
        fn msi(&self) -> io::Result<Box<dyn MsiRoute>> {
            let mut routes = self.routes.lock().unwrap();
            routes.push(None);
            Ok(Box::new(FakeRoute {
                index: routes.len() - 1,
                event: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?),
                routes: Arc::clone(&self.routes),
            }))
        }

        fn line(&self, _gsi: u32) -> Arc<dyn IrqLine> {
            Arc::clone(&self.line) as _
        }

        fn edge(&self, _gsi: u32) -> io::Result<EventFd> {
            EventFd::new(libc::EFD_NONBLOCK)
        }

        fn attach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
            match self.doorbells.lock().unwrap().insert(address, event.as_raw_fd()) {
                None => Ok(()),
                Some(_) => Err(io::Error::from_raw_os_error(libc::EEXIST)),
            }
        }

        fn detach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
            match self.doorbells.lock().unwrap().remove(&address) {
                Some(fd) if fd == event.as_raw_fd() => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            }
        }
    }
}
