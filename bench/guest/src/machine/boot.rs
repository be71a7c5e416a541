//! From the VMM's hands to ring 3: the PVH entry (32-bit, paging off), the application processors' trampoline (real
//! mode), long mode with 2 MiB identity pages that ring 3 may use, and the `iretq`.
//!
//! Everything that needs ring 0 is here and is kept short: under a software KVM ring 0 is emulated instruction by
//! instruction, ring 3 runs natively. Tables that a loader would otherwise fill (page tables, GDT) are laid out by the
//! assembler, tables that need arithmetic (IDT) are filled from ring 3, which is allowed to write all of memory.
//!
//! Specifications: the x86/HVM direct boot ABI (PVH) and the Intel SDM, volume 3, chapters 3, 4, 6, 7 and 9.

#![allow(unsafe_code, reason = "machine entry, and the tables that it shares with the CPU")]

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The most vCPUs that the guest starts.
pub const MAX_CPUS: usize = 64;
/// Where the trampoline is copied: below 1 MiB, on a page boundary, clear of what VMMs put there.
pub const TRAMPOLINE: usize = 0x1_0000;
/// Code selector for ring 3, with its privilege level.
pub const USER_CODE: u64 = 0x23;
/// Code selector for ring 0.
pub const KERNEL_CODE: u16 = 0x08;

const IO_BITMAP: usize = 104;
const IO_BITMAP_END: usize = IO_BITMAP + 8192;
const KERNEL_STACK: usize = 2048;
const USER_STACK: usize = 64 * 1024;

/// What each vCPU has for itself: its task state with the bitmap that opens all I/O ports, and its stacks.
#[repr(C, align(4096))]
struct CpuArea {
    tss: [u8; IO_BITMAP_END + 8],
    /// Used by the interrupt handlers (RSP0) and before ring 3 is reached.
    kernel_stack: [u8; KERNEL_STACK],
    user_stack: [u8; USER_STACK],
}

const CPU_AREA: usize = size_of::<CpuArea>();
const KERNEL_STACK_TOP: usize = (core::mem::offset_of!(CpuArea, kernel_stack) + KERNEL_STACK) & !15;
const USER_STACK_TOP: usize = CPU_AREA & !15;

/// Memory that both the CPU (or ring 0) and ring 3 write.
#[repr(transparent)]
struct Shared<T>(UnsafeCell<T>);
// SAFETY: each user of a `Shared` says how its accesses are ordered; Rust code never holds references into one.
unsafe impl<T> Sync for Shared<T> {}

#[unsafe(no_mangle)]
static boot_cpu_areas: Shared<[CpuArea; MAX_CPUS]> = Shared(UnsafeCell::new(
    [const { CpuArea { tss: [0; IO_BITMAP_END + 8], kernel_stack: [0; KERNEL_STACK], user_stack: [0; USER_STACK] } };
        MAX_CPUS],
));

/// The index of the vCPU that comes up next: the boot processor is 0, the others are started one by one.
#[unsafe(no_mangle)]
static boot_cpu_index: AtomicU32 = AtomicU32::new(0);

/// Physical address of the PVH start info, from EBX at the entry.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data")]
static boot_start_info: AtomicU32 = AtomicU32::new(0);

/// The leaves that ring 0 asks CPUID for: in ring 3 a software KVM shows the host's.
#[unsafe(no_mangle)]
static boot_cpuid_leaves: [u32; CPUID_LEAVES] = [0, 1, 0x15, 0x16, 0x4000_0000, 0x4000_0001, 0x4000_0010, 0x8000_0008];
const CPUID_LEAVES: usize = 8;

#[unsafe(no_mangle)]
static boot_cpuid_answers: [[AtomicU32; 4]; CPUID_LEAVES] = [const { [const { AtomicU32::new(0) }; 4] }; CPUID_LEAVES];

/// The page that KVM keeps up to date when the kvmclock was enabled (`struct pvclock_vcpu_time_info`).
#[unsafe(no_mangle)]
static boot_pvclock: PvClock = PvClock([const { AtomicU64::new(0) }; 4]);

#[repr(C, align(64))]
struct PvClock([AtomicU64; 4]);

unsafe extern "C" {
    safe static image_end: u8;
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
}

/// The first address behind the image, its uninitialised part included.
pub fn end_of_image() -> usize {
    &raw const image_end as usize
}

/// Physical address of the PVH start info.
pub fn start_info() -> usize {
    boot_start_info.load(Ordering::Relaxed) as usize
}

/// EAX, EBX, ECX and EDX of a CPUID leaf, as ring 0 saw them at the start; `None` for a leaf that was not asked for.
pub fn cpuid(leaf: u32) -> Option<[u32; 4]> {
    let index = boot_cpuid_leaves.iter().position(|&known| known == leaf)?;
    Some(boot_cpuid_answers[index].each_ref().map(|register| register.load(Ordering::Relaxed)))
}

/// `tsc_to_system_mul` and `tsc_shift` of the kvmclock; `None` if there is no kvmclock.
pub fn pvclock_scale() -> Option<(u32, i8)> {
    let word = boot_pvclock.0[3].load(Ordering::Acquire);
    let (multiplier, shift) = (word as u32, (word >> 32) as i8);
    (multiplier != 0).then_some((multiplier, shift))
}

/// Says which index the next application processor takes.
pub fn set_next_cpu(index: usize) {
    boot_cpu_index.store(index as u32, Ordering::SeqCst);
}

/// Copies the trampoline to [`TRAMPOLINE`].
pub fn place_trampoline() {
    // SAFETY: both symbols bound one block of the image; the target page is RAM that the memory map's low entry
    // covers and that nothing of ours uses.
    unsafe {
        let start = &raw const ap_trampoline;
        let len = (&raw const ap_trampoline_end).offset_from_unsigned(start);
        core::ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, len);
    }
}

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18                      # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    mov dx, 0x3f8                       # a harness stamps the first guest instruction by this byte: the
    mov al, 0x72                        # first letter of the greeting that ring 3 completes
    out dx, al
    cli
    cld
    mov dword ptr [boot_start_info], ebx

enter_long_mode:
    mov eax, cr4
    or eax, 0x620                       # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, cr0
    and eax, 0xfffffff3                 # not EM, not TS
    or eax, 0x80000023                  # PG, NE, MP, PE
    mov cr0, eax
    lgdt [boot_gdtr]
    .byte 0xea                          # far jump into the 64-bit code segment
    .long long_entry
    .word 0x08

    .code64
long_entry:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov edi, dword ptr [boot_cpu_index]
    imul rbx, rdi, {cpu_area}
    add rbx, offset boot_cpu_areas
    lea rsp, [rbx + {kernel_stack_top}]
    mov qword ptr [rbx + 4], rsp        # TSS.RSP0
    mov word ptr [rbx + 102], {io_bitmap}
    mov byte ptr [rbx + {io_bitmap_end}], 0xff
    mov rax, rbx                        # the descriptor: base 23:0 at bit 16, base 31:24 at bit 56
    and eax, 0xffffff
    shl rax, 16
    mov rcx, rbx
    shr rcx, 24
    shl rcx, 56
    or rax, rcx
    mov rcx, {tss_descriptor}
    or rax, rcx
    mov ecx, edi
    shl ecx, 4
    mov qword ptr [rcx + boot_gdt_tss], rax
    mov qword ptr [rcx + boot_gdt_tss + 8], 0
    add ecx, 0x30
    ltr cx
    lidt [boot_idtr]
    mov ecx, 0x1b                       # IA32_APIC_BASE: leave x2APIC mode, by way of "disabled", if we are in it
    rdmsr
    test eax, 0x400
    jz 1f
    and eax, 0xfffff3ff
    wrmsr
    or eax, 0x800
    wrmsr
1:  test edi, edi
    jnz 5f

    mov al, 0xff                        # the boot processor: mask the legacy PICs
    out 0x21, al
    out 0xa1, al
    xor esi, esi
2:  mov eax, dword ptr [rsi * 4 + boot_cpuid_leaves]
    xor ecx, ecx
    cpuid
    mov r8d, esi
    shl r8d, 4
    mov dword ptr [r8 + boot_cpuid_answers], eax
    mov dword ptr [r8 + boot_cpuid_answers + 4], ebx
    mov dword ptr [r8 + boot_cpuid_answers + 8], ecx
    mov dword ptr [r8 + boot_cpuid_answers + 12], edx
    inc esi
    cmp esi, {cpuid_leaves}
    jne 2b
    cmp dword ptr [boot_cpuid_answers + 4 * 16 + 4], 0x4b4d564b   # "KVMK": KVMKVMKVM
    jne 4f
    test byte ptr [boot_cpuid_answers + 5 * 16], 8                # KVM_FEATURE_CLOCKSOURCE2
    jz 4f
    mov ecx, 0x4b564d01                 # MSR_KVM_SYSTEM_TIME_NEW
    mov eax, offset boot_pvclock + 1
    xor edx, edx
    wrmsr
4:  imul rbx, rdi, {cpu_area}
    add rbx, offset boot_cpu_areas

5:  mov rax, rbx
    add rax, {user_stack_top} - 8       # as after a call
    push 0x1b
    push rax
    push 0x202                          # interrupts on: ring 3 cannot change that
    push {user_code}
    push offset cpu_main
    xor ebp, ebp
    iretq

    .code16
    .global ap_trampoline
ap_trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        # lgdt with a 32-bit base
    .word ap_gdtr - ap_trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                    # far jump into the 32-bit code segment
    .long ap_protected
    .word 0x28
    .balign 4
ap_gdtr:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt
    .global ap_trampoline_end
ap_trampoline_end:

    .code32
ap_protected:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    jmp enter_long_mode

    .code64                             # the mode outlives this block
    .section .data
    .balign 16
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 ring 0 code, 64-bit
    .quad 0x00cf93000000ffff            # 0x10 ring 0 data
    .quad 0x00cff3000000ffff            # 0x18 ring 3 data
    .quad 0x00affb000000ffff            # 0x20 ring 3 code, 64-bit
    .quad 0x00cf9b000000ffff            # 0x28 ring 0 code, 32-bit: the trampoline's
boot_gdt_tss:                           # 0x30 one task state per vCPU
    .fill {max_cpus} * 2, 8, 0
boot_gdt_end:
    .balign 8
boot_gdtr:
    .word boot_gdt_end - boot_gdt - 1
    .quad boot_gdt
    .balign 8
boot_idtr:
    .word 256 * 16 - 1
    .quad boot_idt

    .balign 4096
    .global boot_pml4
boot_pml4:                              # present, writable, user, accessed
    .quad boot_pdpt + 0x27
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x0027, boot_pd + 0x1027, boot_pd + 0x2027, boot_pd + 0x3027
    .fill 508, 8, 0
boot_pd:                                # the first 4 GiB; accessed, dirty and "2 MiB page" too
    .set address, 0
    .rept 2048
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr
    .text
"#,
    cpu_area = const CPU_AREA,
    kernel_stack_top = const KERNEL_STACK_TOP,
    user_stack_top = const USER_STACK_TOP,
    io_bitmap = const IO_BITMAP,
    io_bitmap_end = const IO_BITMAP_END,
    // Limit (up to and with the byte that ends the bitmap), present, available 64-bit TSS.
    tss_descriptor = const 0x0000_8900_0000_0000_u64 | IO_BITMAP_END as u64,
    user_code = const USER_CODE,
    max_cpus = const MAX_CPUS,
    cpuid_leaves = const CPUID_LEAVES,
);
