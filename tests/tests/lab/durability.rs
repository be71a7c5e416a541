//! What the guest saw acknowledged is on the disk: when the VMM is killed, when the host loses its power, when the VMM is
//! told to end.

use ringvm_tests::Result;
use ringvm_tests::lab::{Exit, Guest, Image, Lab, disk, lab, vm};
use ringvm_tests::native::Place;
use rustix::process::Signal;

/// Records of 4 KiB apart, each acknowledged on the console once it is down.
fn writer(dd: &str) -> String {
    format!(
        "i=0; while [ $i -lt 4000 ]; do printf \"record %08d \" $i | \
         dd of=/dev/vda bs=512 seek=$((i * 8)) {dd} 2>/dev/null || break; echo acked-$i-; i=$((i + 1)); done; echo stopped $i"
    )
}

/// Lets the guest write until some records are acknowledged.
fn write_some(guest: &mut Guest, dd: &str) -> Result<()> {
    guest.start(&writer(dd))?;
    guest.expect("acked-60-").map(drop)
}

/// Asserts that the image has every record that the console shows as acknowledged, in its place.
fn all_there(lab: &Lab, guest: &Guest, image: &Image) -> Result<()> {
    let console = guest.console();
    assert!(!console.contains("stopped"), "the writer ended before the test did:\n{console}");
    let acknowledged = console.split("acked-").skip(1).filter_map(|rest| rest.split_once('-'));
    let last: usize = acknowledged.filter_map(|(number, _)| number.parse().ok()).max().expect("acknowledged records");
    let found = lab.run(&format!("grep -ao 'record [0-9]*' {}", image.path))?;
    let found: Vec<_> = found.lines().collect();
    for number in 0..=last {
        assert_eq!(found.get(number), Some(&format!("record {number:08}").as_str()), "of {last} acknowledged");
    }
    Ok(())
}

#[test]
fn kill_9_loses_no_write_that_was_fsynced() {
    kill_9(Place::Process);
}

#[test]
fn kill_9_loses_no_write_that_was_fsynced_in_a_daemon() {
    kill_9(Place::Daemon);
}

fn kill_9(place: Place) {
    lab(|lab| {
        let image = lab.image("32M")?;
        let mut guest = lab.boot(&vm().disk(disk(&image).place(place)))?;
        write_some(&mut guest, "conv=sync,notrunc,fsync")?;
        guest.signal(Signal::KILL)?;
        assert_eq!(guest.exit()?, Exit::Signal(9));
        all_there(lab, &guest, &image)
    });
}

#[test]
fn kill_9_loses_no_write_that_was_fsynced_to_direct_storage() {
    lab(|lab| {
        let image = lab.image("32M")?;
        let mut guest = lab.boot(&vm().cpus(2).disk(disk(&image).queues(2).direct()))?;
        write_some(&mut guest, "conv=sync,notrunc,fsync")?;
        guest.signal(Signal::KILL)?;
        assert_eq!(guest.exit()?, Exit::Signal(9));
        all_there(lab, &guest, &image)
    });
}

#[test]
fn a_power_cut_of_the_host_loses_no_write_that_was_fsynced() {
    power_cut(Place::Process);
}

#[test]
fn a_power_cut_of_the_host_loses_no_write_that_was_fsynced_in_a_daemon() {
    power_cut(Place::Daemon);
}

fn power_cut(place: Place) {
    lab(|lab| {
        let image = lab.image("32M")?;
        let mut guest = lab.boot(&vm().disk(disk(&image).place(place)))?;
        write_some(&mut guest, "conv=sync,notrunc,fsync")?;
        lab.power_cut()?;
        // What the console had shown by then.
        let _ = guest.exit();
        all_there(lab, &guest, &image)
    });
}

#[test]
fn sigterm_in_the_middle_of_writes_flushes_and_exits() {
    sigterm(Place::Process);
}

#[test]
fn sigterm_in_the_middle_of_writes_flushes_and_exits_in_a_daemon() {
    sigterm(Place::Daemon);
}

fn sigterm(place: Place) {
    lab(|lab| {
        let image = lab.image("32M")?;
        let mut guest = lab.boot(&vm().disk(disk(&image).place(place)))?;
        // Written through the guest's page cache, never flushed by the guest.
        write_some(&mut guest, "conv=sync,notrunc oflag=direct")?;
        guest.signal(Signal::TERM)?;
        assert_eq!(guest.exit()?, Exit::Code(0), "{}", guest.stderr());
        // Only what ringvm itself flushed survives this.
        lab.power_cut()?;
        all_there(lab, &guest, &image)
    });
}
