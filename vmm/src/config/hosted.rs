//! A user's description of the devices that are written for rust-vmm's backend trait: their options, names and places.

use ringvm_backends::options::Check;
use ringvm_hosted::console::{ConsoleOptions, Kind};
use ringvm_hosted::vsock::VsockOptions;

use super::devices::{DeviceName, Place};

ringvm_backends::options! {
    /// A virtio console as the command line and the configuration file describe it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct ConsoleDevice {
        ..pub console: ConsoleOptions,
        /// Name of the device in logs, statistics and messages. Without it, console0, console1 and so on.
        #[key(value("NAME"))]
        pub id: Option<DeviceName>,
        /// Serve the console in this process, or in a daemon that ringvm starts.
        pub place: Place,
    }
}

ringvm_backends::options! {
    /// A vsock device as the command line and the configuration file describe it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct VsockDevice {
        ..pub vsock: VsockOptions,
        /// Name of the device in logs, statistics and messages. Without it, vsock0.
        #[key(value("NAME"))]
        pub id: Option<DeviceName>,
        /// Serve the device in this process, or in a daemon that ringvm starts.
        pub place: Place,
    }
}

impl ConsoleDevice {
    /// Name of the console of this index.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        DeviceName::or_default(self.id.as_ref(), "console", index)
    }

    /// Whether its other end is the standard input and output of this process.
    #[must_use]
    pub fn is_stdio(&self) -> bool {
        self.console.kind == Some(Kind::Stdio)
    }
}

impl Check for ConsoleDevice {
    fn check(&self) -> Result<(), String> {
        self.console.check()?;
        if self.is_stdio() && self.place == Place::Daemon {
            return Err("a daemon has no terminal; serve stdio with place=process".into());
        }
        Ok(())
    }
}

impl VsockDevice {
    /// Name of the device.
    #[must_use]
    pub fn name(&self) -> String {
        DeviceName::or_default(self.id.as_ref(), "vsock", 0)
    }
}

impl Check for VsockDevice {
    fn check(&self) -> Result<(), String> {
        self.vsock.check()
    }
}
