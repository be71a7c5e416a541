//! A folder of L1 that virtiofsd, a third-party daemon, shares with a stock guest.

use std::time::Duration;

use ringvm_tests::Result;
use ringvm_tests::host::{Need, need};
use ringvm_tests::lab::{Exit, Guest, Lab, lab, vm};

/// TCG in TCG.
const LIMIT: Duration = Duration::from_secs(240);
/// What `fsx` does to a file, each with what it has read compared with what was written.
const OPERATIONS: u32 = 2_000;
/// The sums of a tree, without what was not there when it was made.
const SUMS: &str = "find . -type f | sort | xargs md5sum | md5sum && find . | wc -l";
/// A tree as a checkout of a repository has it: small files in many folders, hard and symbolic links, names that change.
const TREE: &str = "for d in $(seq 20); do mkdir -p src/$d/a/b && for f in $(seq 10); do \
    echo $d-$f > src/$d/a/b/$f.lock && mv src/$d/a/b/$f.lock src/$d/a/b/$f; done; \
    ln src/$d/a/b/1 src/$d/hard && ln -s a/b/2 src/$d/soft && chmod 750 src/$d/a/b/3; done; \
    cp -a /lib /modules . && rm -r src/20 && mv src/19 src/nineteen";

/// Starts virtiofsd over `folder`. It ends with its frontend.
fn serve(lab: &Lab, folder: &str) -> Result<String> {
    let socket = format!("{folder}.sock");
    lab.run(&format!(
        "mkdir -p {folder} && (virtiofsd --shared-dir {folder} --socket-path {socket} >/run/virtiofsd.log 2>&1 &) && \
         until [ -S {socket} ]; do sleep 0.1; done"
    ))?;
    Ok(socket)
}

fn mounted(guest: &mut Guest, command: &str) -> Result<String> {
    guest.run_for(LIMIT, &format!("mount -t virtiofs shared /mnt && (cd /mnt && {command}) && umount /mnt"))
}

#[test]
fn a_stock_guest_keeps_a_tree_in_a_folder_that_virtiofsd_shares() {
    if !need(Need::Foreign) {
        return;
    }
    lab(|lab| {
        let folder = lab.path("shared");
        // The program that exercises file systems comes to the guest through one.
        lab.run(&format!("mkdir -p {folder} && cp /bin/fsx {folder}/ && echo from-the-host > {folder}/greeting"))?;
        let mut sums = String::new();
        for start in 0..2 {
            let socket = serve(lab, &folder)?;
            let mut guest = lab.boot(&vm().arg("--fs").arg(&format!("tag=shared,socket={socket}")))?;
            assert_eq!(mounted(&mut guest, "cat greeting")?, "from-the-host");
            if start == 0 {
                mounted(&mut guest, &format!("mkdir tree && cd tree && {TREE}"))?;
                sums = mounted(&mut guest, &format!("cd tree && {SUMS}"))?;
                assert_eq!(sums, lab.run(&format!("cd {folder}/tree && {SUMS}"))?, "the guest's files, seen from L1");
                let said = mounted(&mut guest, &format!("./fsx -N {OPERATIONS} -S 12 fsx.data 2>&1 | tail -n 3"))?;
                assert!(said.contains("All operations completed"), "{said}");
            }
            // After unmounting, and in another guest.
            assert_eq!(mounted(&mut guest, &format!("cd tree && {SUMS}"))?, sums);
            let links = mounted(
                &mut guest,
                "stat -c %h,%a tree/src/1/a/b/1 && readlink tree/src/1/soft && cat tree/src/1/soft",
            )?;
            assert_eq!(links, "2,644\na/b/2\n1-2");
            assert_eq!(guest.power_off()?, Exit::Code(0));
            lab.run("until ! pidof virtiofsd; do sleep 0.1; done")?;
        }
        println!("virtiofsd said: {}", lab.run("cat /run/virtiofsd.log")?);
        Ok(())
    });
}
