//! scratch
use std::time::Duration;
use ringvm_tests::lab::{lab, vm};
fn main() {
    lab(|lab| {
        let mut guest = lab.boot(&vm().cpus(1).arg("--no-reboot").arg("-vv"))?;
        guest.run("dmesg | grep -iE 'acpi|apic' | head -60").map(|t| println!("{t}"))?;
        guest.start("reboot -f")?;
        guest.listen(Duration::from_secs(8))?;
        let pid = guest.pid();
        for c in [format!("for t in /proc/{pid}/task/*; do cat $t/comm $t/wchan $t/stack; echo; done; top -b -n1 | head -12"),
            "mount -t tracefs t /sys/kernel/tracing; cd /sys/kernel/tracing; echo 1 > events/kvm/enable; echo 1 > tracing_on; sleep 1; echo 0 > tracing_on; wc -l trace; tail -40 trace".into()] {
            println!("L1> {c}\n{}", lab.run(&c).unwrap_or_else(|e| e.to_string()));
        }
        println!("--- console {} \n--- stderr\n{}", guest.console(), guest.stderr());
        Ok(())
    });
}
