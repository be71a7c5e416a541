//! Code at the reset vector of a PC, as far as software still uses it: a jump there resets the machine.
//!
//! Linux on hardware-reduced ACPI asks EFI for a reset, and without EFI goes back to real mode and jumps to
//! F000:FFF0.

use ringvm_backends::device::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, memory_error};
use crate::arch::x86_64::layout::RESET_VECTOR;
use crate::legacy::acpi::{PORT_RESET, RESET_VALUE};

/// Places the code.
pub(super) fn write(memory: &GuestMemory) -> Result<(), BootError> {
    let [port_low, port_high] = (PORT_RESET as u16).to_le_bytes();
    let code = [
        // mov al, RESET_VALUE; mov dx, PORT_RESET; out dx, al
        [0xb0, RESET_VALUE].as_slice(),
        &[0xba, port_low, port_high],
        &[0xee],
        // hlt; jmp to the hlt
        &[0xf4, 0xeb, 0xfd],
    ]
    .concat();
    memory.write_slice(&code, GuestAddress(RESET_VECTOR)).map_err(memory_error("the reset vector"))
}
