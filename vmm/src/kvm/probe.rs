//! The abilities of this host's KVM, for `ringvm check`.

use std::io;

use super::error::{KvmError, advice};
use super::vm::{Kvm, NEEDED};

/// The findings.
#[derive(Debug)]
pub struct Report {
    /// KVM opened and has every needed capability.
    pub usable: bool,
    /// One line about it.
    pub text: String,
    /// Advice, if not usable.
    pub advice: Option<String>,
}

/// Looks at KVM, up to creating a VM.
#[must_use]
pub fn probe() -> Report {
    match Kvm::open() {
        Ok(kvm) => match kvm.system.create_vm() {
            Ok(_) => Report {
                usable: true,
                text: format!(
                    "/dev/kvm offers all {} needed capabilities, up to {} vCPUs, {}-bit physical addresses",
                    NEEDED.len(),
                    kvm.max_vcpus(),
                    kvm.physical_bits()
                ),
                advice: None,
            },
            Err(error) => {
                let error = io::Error::from(error);
                let busy = "another hypervisor may hold the CPU's virtualization; stop it";
                Report { usable: false, text: format!("creating a VM: {error}"), advice: Some(busy.into()) }
            }
        },
        Err(KvmError::Open { source }) => {
            Report { usable: false, text: format!("opening /dev/kvm: {source}"), advice: Some(advice(&source).into()) }
        }
        Err(error) => Report { usable: false, text: error.to_string(), advice: None },
    }
}
