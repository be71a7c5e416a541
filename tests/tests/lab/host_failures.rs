//! What a host may lack, shown in L1, where it can be taken away: one clear line before the guest starts.

use ringvm_tests::lab::{Exit, Lab, Vm, disk, lab, vm};
use ringvm_tests::{Error, Result};

const CONFIGURATION: i32 = 2;
const HOST: i32 = 3;

/// Runs ringvm for this guest behind `prefix`, and has it refused with this code in one line that has all these words.
fn refused(lab: &Lab, prefix: &str, machine: &Vm, code: i32, words: &[&str]) -> Result<()> {
    let arguments: Vec<_> = machine.args().into_iter().map(|a| format!("'{a}'")).collect();
    let command = format!("{prefix} timeout 20 /bin/ringvm {} </dev/null", arguments.join(" "));
    let output = lab.output(&command)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let one_line = said.trim_end().lines().count() == 1 && output.stdout.is_empty();
    if output.exit == Exit::Code(code) && one_line && words.iter().all(|word| said.contains(word)) {
        return Ok(());
    }
    Err(Error::Check(format!(
        "`{command}` ended with {}, wanted were code {code} and one line with {words:?}; stdout {:?}, stderr:\n{said}",
        output.exit,
        String::from_utf8_lossy(&output.stdout),
    )))
}

#[test]
fn pitfall_58_without_dev_kvm() {
    lab(|lab| {
        lab.run("mv /dev/kvm /dev/kvm.away")?;
        let checked = refused(lab, "", &vm(), HOST, &["/dev/kvm", "No such file"]);
        let said = lab.output("ringvm check");
        lab.run("mv /dev/kvm.away /dev/kvm")?;
        checked?;
        let said = String::from_utf8_lossy(&said?.stdout).into_owned();
        assert!(said.contains("/dev/kvm"), "{said}");
        Ok(())
    });
}

#[test]
fn pitfall_58_without_permission_for_dev_kvm() {
    lab(|lab| {
        lab.run("chmod 600 /dev/kvm")?;
        let nobody = "/bin/setpriv --reuid 65534 --regid 65534 --clear-groups --";
        refused(lab, nobody, &vm(), HOST, &["/dev/kvm", "Permission denied"])
    });
}

#[test]
fn pitfall_58_without_io_uring() {
    lab(|lab| {
        let image = lab.image("1M")?;
        refused(lab, "without-io-uring", &vm().disk(disk(&image)), HOST, &["io_uring"])
    });
}

#[test]
fn a_disk_on_a_file_system_without_o_direct() {
    lab(|lab| {
        // L1's 6.1 has no O_DIRECT on tmpfs; newer kernels have.
        lab.run("truncate -s 1M /tmp/no-direct.img")?;
        let image = ringvm_tests::lab::Image { path: "/tmp/no-direct.img".into() };
        let checked = refused(lab, "", &vm().disk(disk(&image).direct()), CONFIGURATION, &[&image.path, "direct"]);
        lab.run("rm /tmp/no-direct.img")?;
        checked
    });
}

#[test]
fn pitfall_58_hugepages_that_the_host_has_not_set_aside() {
    lab(|lab| {
        assert_eq!(lab.run("cat /proc/sys/vm/nr_hugepages")?, "0");
        refused(lab, "", &vm().memory("size=64M,hugepages=2M"), HOST, &["huge"])
    });
}
