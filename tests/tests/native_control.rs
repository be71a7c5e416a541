//! What a control plane asks of a running machine: devices attached and detached by name, vCPUs paused and resumed.

#[path = "common/in_process.rs"]
mod in_process;

use std::time::Duration;

use crossbeam_channel::unbounded;
use in_process::{Guest, LIMIT, is_locked};
use ringvm::control::Request;
use ringvm::kvm::VcpuState;
use ringvm::machine::MachineError;
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_tests::embedded::{image, ready};

#[test]
fn a_name_is_attached_once() {
    if !ready() {
        return;
    }
    let (one, other) = (image(1), image(1));
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let guest = Guest::start("job=none");
    let disk = |image: &tempfile::NamedTempFile| {
        let options = BlockOptions { path: Some(image.path().into()), ..BlockOptions::default() };
        Box::new(BlockDevice::open("data", &options, &pool).expect("the image is free"))
    };
    guest.attach(disk(&one)).expect("it is attached");
    let error = guest.attach(disk(&other)).expect_err("there is one of that name");
    assert!(matches!(&error, MachineError::Attached(name) if name == "data"), "{error}");
    assert!(!is_locked(other.path()), "what was refused is let go");
    assert!(matches!(guest.detach("date"), Err(MachineError::NoDevice(_))));
    drop(guest.detach("data").expect("it is there"));
    guest.attach(disk(&one)).expect("the name is free again");
    guest.stop();
}

#[test]
fn slots_run_out_and_come_back() {
    if !ready() {
        return;
    }
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let guest = Guest::start("job=none");
    let rng = |n: usize| Box::new(ringvm_backends::rng::RngDevice::new(&format!("rng{n}"), &pool));
    for n in 0..31 {
        guest.attach(rng(n)).expect("there is room for 31 beside the host bridge");
    }
    assert!(matches!(guest.attach(rng(31)), Err(MachineError::Pci(_))));
    drop(guest.detach("rng7").expect("it is there"));
    assert_eq!(guest.attach(rng(31)).expect("there is room again").slot, 8);
    guest.stop();
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on_where_it_was() {
    if !ready() {
        return;
    }
    let guest = Guest::start("job=hotplug rounds=1");
    guest.expect("start job=hotplug");
    let (paused, heard) = unbounded();
    guest.serve(Request::Pause(paused));
    assert_eq!(heard.recv_timeout(LIMIT), Ok(0));
    let save = || {
        let (reply, state) = unbounded();
        guest.serve(Request::Save(reply));
        state.recv_timeout(LIMIT).expect("a paused vCPU says what state it is in")
    };
    let (first, second) = (save(), save());
    assert_eq!((first.regs.rip, first.regs.rsp), (second.regs.rip, second.regs.rsp));
    assert_ne!(first.regs.rip, 0);
    const TSC: u32 = 0x10;
    let tsc = |state: &VcpuState| state.msrs.iter().find(|msr| msr.index == TSC).map(|msr| msr.data);
    assert!(tsc(&first).is_some() && tsc(&second) > tsc(&first), "{:?}, then {:?}", tsc(&first), tsc(&second));
    // A disk that comes now is not found before the guest goes on.
    let image = image(1);
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let options = BlockOptions { path: Some(image.path().into()), ..BlockOptions::default() };
    let disk = BlockDevice::open("disk9", &options, &pool).expect("the image is free");
    guest.attach(Box::new(disk)).expect("it is attached");
    assert!(guest.lines.recv_timeout(Duration::from_millis(300)).is_err(), "a paused guest says nothing");
    guest.serve(Request::Resume);
    guest.expect("let-go round=0");
    guest.stop();
}
