//! Interrupts and exceptions: handlers of a few instructions in ring 0, everything else in ring 3.
//!
//! A device's vector counts itself and writes the local APIC's EOI. A `hlt` in ring 3 is an exception whose handler halts. Any
//! other exception stores what the CPU says about it and
//! returns to [`report`] in ring 3, which prints one line and powers off.

#![allow(unsafe_code, reason = "the interrupt descriptor table and what the handlers write")]

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::machine::boot::{KERNEL_CODE, USER_CODE};
use crate::machine::fail;

/// The first vector that is handed to a device.
pub const FIRST_VECTOR: usize = 0x40;
/// How many vectors are handed to devices.
pub const VECTORS: usize = 128;
/// The device vector, by index, that the local APIC's timer has.
pub const TIMER: usize = VECTORS - 1;
/// The local APIC's spurious vector.
pub const SPURIOUS: u8 = 0xff;

const EXCEPTIONS: usize = 32;
/// General protection: what an instruction raises that only ring 0 may use.
const PROTECTION: usize = 13;
const EXCEPTION_STUB: usize = 16;
const DEVICE_STUB: usize = 32;

#[repr(C, align(64))]
struct Counter(AtomicU64);

#[unsafe(no_mangle)]
static irq_counts: [Counter; VECTORS] = [const { Counter(AtomicU64::new(0)) }; VECTORS];

/// Vector, error code, RIP, CR2, RSP.
#[unsafe(no_mangle)]
static fault: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];

#[repr(C, align(4096))]
struct Idt(UnsafeCell<[[u64; 2]; 256]>);
// SAFETY: written by the boot processor before any other runs and before any device may interrupt, except by
// `destroy`, which wants the machine to fall over.
unsafe impl Sync for Idt {}

#[unsafe(no_mangle)]
static boot_idt: Idt = Idt(UnsafeCell::new([[0; 2]; 256]));

#[repr(C, align(16))]
struct FaultStack(UnsafeCell<[u8; 16 * 1024]>);
// SAFETY: only ever the stack of `report`.
unsafe impl Sync for FaultStack {}

#[unsafe(no_mangle)]
static fault_stack: FaultStack = FaultStack(UnsafeCell::new([0; 16 * 1024]));

unsafe extern "C" {
    safe static exception_stubs: u8;
    safe static device_stubs: u8;
    safe static spurious_stub: u8;
    safe static protection_stub: u8;
    fn halt_in_ring_3(counter: *const AtomicU64, seen: u64);
}

/// Fills the interrupt descriptor table.
pub fn init() {
    let exceptions = &raw const exception_stubs as usize;
    for vector in 0..EXCEPTIONS {
        set_gate(vector, exceptions + vector * EXCEPTION_STUB);
    }
    let devices = &raw const device_stubs as usize;
    for index in 0..VECTORS {
        set_gate(FIRST_VECTOR + index, devices + index * DEVICE_STUB);
    }
    set_gate(usize::from(SPURIOUS), &raw const spurious_stub as usize);
    set_gate(PROTECTION, &raw const protection_stub as usize);
}

fn set_gate(vector: usize, handler: usize) {
    let handler = handler as u64;
    // Present, 64-bit interrupt gate: interrupts are off in the handler.
    let low = (handler & 0xffff) | (u64::from(KERNEL_CODE) << 16) | (0x8e00 << 32) | ((handler >> 16 & 0xffff) << 48);
    let table = boot_idt.0.get();
    // SAFETY: in bounds for every vector (an index is checked), and see `Idt` for who writes when.
    unsafe { (&raw mut (*table)[vector]).write_volatile([low, handler >> 32]) };
}

/// How often the device vector of this index has been taken.
pub fn count(index: usize) -> u64 {
    irq_counts[index].0.load(Ordering::Acquire)
}

/// Halts this vCPU until its next interrupt, whichever that is; but not if the device vector of this index has been taken
/// since it was counted to `seen`: one that comes in between would be slept over.
pub fn halt_unless_counted(index: usize, seen: u64) {
    // SAFETY: the stub reads the counter and changes nothing else of this vCPU.
    unsafe { halt_in_ring_3(&raw const irq_counts[index].0, seen) };
}

/// Empties the descriptor table and takes an exception: a triple fault.
pub fn destroy() -> ! {
    for vector in 0..256 {
        let table = boot_idt.0.get();
        // SAFETY: in bounds; that the CPU finds no gates any more is the point.
        unsafe { (&raw mut (*table)[vector]).write_volatile([0, 0]) };
    }
    // SAFETY: raises an exception that nothing can handle; control does not come back.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}

/// Where an exception returns to, in ring 3 and on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn fault_report() -> ! {
    let [vector, error, rip, cr2, rsp] = fault.each_ref().map(|word| word.load(Ordering::Relaxed));
    fail(format_args!(
        "exception where=cpu expected=none got=vector:{vector},error:{error:#x},rip:{rip:#x},cr2:{cr2:#x},rsp:{rsp:#x}"
    ))
}

global_asm!(
    r#"
    .text
    .balign 32
    .global device_stubs
device_stubs:
    .set index, 0
    .rept {vectors}
    .balign 32
    inc qword ptr [irq_counts + 64 * index]
    push rax
    mov eax, 0xfee000b0                 # the local APIC's EOI register
    mov dword ptr [rax], 0
    pop rax
    iretq
    .set index, index + 1
    .endr

    .balign 16
    .global spurious_stub
spurious_stub:
    iretq

    .balign 16
    .global halt_in_ring_3
halt_in_ring_3:                         # software KVMs know no `int` in ring 3, but what ring 3 may not do is an exception
    hlt
    ret

    .balign 16
    .global protection_stub
protection_stub:                        # error code, rip, cs, rflags, rsp, ss
    cmp qword ptr [rsp + 8], offset halt_in_ring_3
    jne exception_stubs + {protection} * {stub}
    add rsp, 8
    inc qword ptr [rsp]                 # behind the `hlt`
    cmp qword ptr [rdi], rsi
    jne 1f
    sti                                 # from the next instruction on: no interrupt comes before the halt
    hlt
1:  iretq

    .balign 16
    .global exception_stubs
exception_stubs:
    .set index, 0
    .rept {exceptions}
    .balign 16
    .if (0x60227d00 >> index) & 1       # those that push an error code themselves
    .else
    push 0
    .endif
    push index
    jmp exception
    .set index, index + 1
    .endr

exception:                              # vector, error, rip, cs, rflags, rsp, ss
    pop qword ptr [fault]
    pop qword ptr [fault + 8]
    mov rax, qword ptr [rsp]
    mov qword ptr [fault + 16], rax
    mov rax, cr2
    mov qword ptr [fault + 24], rax
    mov rax, qword ptr [rsp + 24]
    mov qword ptr [fault + 32], rax
    mov qword ptr [rsp], offset fault_report
    mov qword ptr [rsp + 8], {user_code}
    mov qword ptr [rsp + 16], 0x202
    mov qword ptr [rsp + 24], offset fault_stack + 16 * 1024 - 8
    mov qword ptr [rsp + 32], 0x1b
    iretq
"#,
    vectors = const VECTORS,
    exceptions = const EXCEPTIONS,
    protection = const PROTECTION,
    stub = const EXCEPTION_STUB,
    user_code = const USER_CODE,
);
