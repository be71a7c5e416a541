//! The embedded guest: a program that is its own operating system, for testing and measuring VMMs.
//!
//! It boots by PVH, goes to ring 3 at once and does all its work there: it finds virtio devices over PCI, drives them like
//! fio does, by polling or by interrupts, on one vCPU or several, checks what they store against a model, and prints
//! results as `key=value` lines on the serial port. What it does is on the command line; see `job.rs`.

#![no_std]
#![no_main]

extern crate alloc;

mod checks;
mod drivers;
mod job;
mod loads;
mod machine;
mod shared;
mod spec;

use crate::checks::{beside, drained, entropy, hostile, hotplug, info, net_hostile, verify};
use crate::job::{Kind, Options, Traffic};
use crate::loads::{exchange, flood, idle, load};
use crate::machine::pvh::StartInfo;
use crate::machine::{acpi, apic, clock, fail, interrupts, power, serial, smp};

/// Where each vCPU arrives in ring 3.
#[allow(unsafe_code, reason = "called by name from the boot code")]
#[unsafe(no_mangle)]
extern "C" fn cpu_main(cpu: usize) -> ! {
    if cpu != 0 {
        smp::serve(cpu);
    }
    serial::init();
    // Its first letter was the very first thing that the guest did.
    serial::line(format_args!("ingvm-guest: hello version={}", env!("CARGO_PKG_VERSION")));
    interrupts::init();
    apic::init();
    smp::init();
    let start = match StartInfo::read() {
        Ok(start) => start,
        Err(what) => fail(format_args!("boot where=pvh expected={what} got=something-else")),
    };
    acpi::init(start.rsdp);
    let jobs = job::parse(&start.command_line);
    let clock_source = if jobs.iter().all(|job| job.kind == Kind::None) { "unused" } else { clock::init() };
    for options in &jobs {
        run(options, &start, clock_source);
    }
    say!("done");
    power::off()
}

fn run(options: &Options, start: &StartInfo, clock_source: &str) {
    match options.kind {
        Kind::None => {}
        Kind::Info => info::run(options, start, clock_source),
        Kind::Load(load) => load::run(options, load),
        Kind::Verify => verify::verify(options),
        Kind::Reset => verify::reset(options),
        Kind::Hostile => hostile::run(options),
        Kind::Beside => beside::run(options),
        Kind::Hotplug => hotplug::run(options),
        Kind::Drained => drained::run(options),
        Kind::Entropy => entropy::run(options),
        Kind::Net(Traffic::Transmit) => flood::transmit(options),
        Kind::Net(Traffic::Receive) => flood::receive(options),
        Kind::Net(Traffic::Echo) => exchange::echo(options),
        Kind::Net(Traffic::Peer) => exchange::peer(options),
        Kind::Net(Traffic::Hostile) => net_hostile::run(options),
        Kind::Idle => idle::run(options),
        Kind::Reboot if options.word == "acpi" => {
            say!("rebooting via=acpi");
            power::reboot_by_acpi()
        }
        Kind::Reboot => {
            say!("rebooting via=keyboard");
            power::reboot_by_keyboard()
        }
        Kind::Crash => {
            say!("crashing");
            power::crash()
        }
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => fail(format_args!("panic where={}:{} expected=none got={}", at.file(), at.line(), info.message())),
        None => fail(format_args!("panic where=unknown expected=none got={}", info.message())),
    }
}

/// The prebuilt `alloc` refers to the unwinder, which nothing here ever starts.
#[allow(unsafe_code, reason = "a name that the linker looks for")]
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    fail(format_args!("unwind where=alloc expected=never got=called"))
}
