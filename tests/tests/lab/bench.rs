//! `ringvm-bench linux` where its guests run: in L1, with fio on a disk and iperf3 over a tap, in this process and in daemons.
//! The figures are TCG's; that there are figures is what is tested.

use std::time::Duration;

use ringvm_tests::lab::{Lab, lab};
use ringvm_tests::{Error, Result, host};
use serde_json::Value;

/// Boots of guests by TCG in TCG, one after the other.
const LIMIT: Duration = Duration::from_secs(480);
/// A start that stays silent is tried this often in all, as those of other guests of the lab are.
const TRIES: u32 = 3;

const JOB: &str =
    "[global]\nioengine=libaio\nbs=4k\nsize=8M\n[rand]\nrw=randread\niodepth=4\n[seq]\nstonewall\nrw=write\nbs=64k\n";

/// Runs a command whose guest may stay silent.
fn started(lab: &mut Lab, command: &str) -> Result<String> {
    for tries in 1..TRIES {
        match lab.run_for(LIMIT, command) {
            Err(Error::Command { output, .. }) if output.contains("did not come up") => {
                host::say(&format!("lab: start {tries} of the bench's guest failed, trying again: {output}"));
            }
            other => return other,
        }
    }
    lab.run_for(LIMIT, command)
}

/// Runs the bench in L1 and gives what it said, and its result.
fn bench(lab: &mut Lab, words: &str) -> Result<(String, Value)> {
    let (job, json, html) = (lab.path("a.fio"), lab.path("a.json"), lab.path("a.html"));
    lab.run(&format!("printf %s '{JOB}' > {job}"))?;
    let temporary = lab.path("tmp");
    let command = format!(
        "mkdir -p {temporary} && TMPDIR={temporary} ringvm-bench linux --kernel /k/bzImage --modules /k/modules --memory 640M --size 32M \
         --boot-limit 75s --limit 100s --fio {job} --json {json} --html {html} {words} 2>&1"
    );
    let said = started(lab, &command)?;
    let result = serde_json::from_str(&lab.run(&format!("cat {json}"))?).expect("a result in JSON");
    assert!(lab.run(&format!("cat {html}"))?.contains("<h2>fio</h2>"));
    Ok((said, result))
}

#[test]
fn fio_and_iperf3_run_in_a_guest_and_on_the_host_beside_it() {
    lab(|lab| {
        let (said, result) = bench(lab, "--runs 1 --iperf3 '-t 1 -P 2' --iperf3 '-t 1 -R'")?;
        println!("{said}");
        let series = result["series"].as_array().expect("series");
        for name in ["host", "ringvm", "ringvm, daemon"] {
            let of = |load: &str| {
                let found = series.iter().find(|series| series["name"] == name && series["load"] == load);
                &found.unwrap_or_else(|| panic!("{name}: {load}: {said}"))["runs"][0]
            };
            let number = |run: &Value, key: &str| run[key].as_u64().unwrap_or_else(|| panic!("{key} of {name}: {run}"));
            // Each job has gone over its 8 MiB once.
            for (load, size) in [("rand", 4 << 10), ("seq", 64 << 10)] {
                let run = of(load);
                assert_eq!((number(run, "ops"), number(run, "bytes")), ((8 << 20) / size, 8 << 20), "{name}: {load}");
                assert!(run["iops"].as_f64().is_some_and(|iops| iops > 0.0), "{run}");
                assert!(number(run, "p99_ns") >= number(run, "p50_ns") && number(run, "p50_ns") > 0, "{run}");
            }
            for (load, streams) in [("-t 1 -P 2", 2), ("-t 1 -R", 1)] {
                let run = of(load);
                assert!(number(run, "bytes") > 1 << 20 && number(run, "time_ns") > 900_000_000, "{run}");
                let rates: Vec<_> = run["streams"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|stream| stream["bits_per_second"].as_f64())
                    .collect();
                assert!(
                    rates.len() == streams && rates.iter().all(|rate| rate.is_some_and(|rate| rate > 0.0)),
                    "{run}"
                );
                assert!(run["streams"][0]["retransmits"].as_u64().is_some(), "{run}");
            }
            if name != "host" {
                for load in ["rand", "-t 1 -R"] {
                    assert!(number(of(load), "cpu_ns") > 0 && number(of(load), "vcpu_ns") > 0, "{name}: {}", of(load));
                }
                assert!(number(of("seq"), "memory_beyond_ram") > 0);
            }
        }
        Ok(())
    });
}

#[test]
fn without_kvm_a_linux_guest_is_refused() {
    lab(|lab| {
        let job = lab.path("a.fio");
        lab.run(&format!("printf %s '{JOB}' > {job} && mv /dev/kvm /dev/kvm.aside"))?;
        let output = lab.output(&format!("ringvm-bench linux --kernel /k/bzImage --fio {job}"));
        lab.run("mv /dev/kvm.aside /dev/kvm")?;
        let said = String::from_utf8_lossy(&output?.stderr).into_owned();
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains("a Linux guest can't be measured without a VM: opening /dev/kvm"), "{said}");
        Ok(())
    });
}

#[test]
fn a_load_that_fails_in_the_guest_is_told_with_its_reason() {
    lab(|lab| {
        let job = lab.path("bad.fio");
        lab.run(&format!("printf '[a]\\nrw=randread\\nsize=1T\\nioengine=nonsense\\n' > {job}"))?;
        let command = format!(
            "TMPDIR=$(mktemp -d -p /scratch) ringvm-bench linux --kernel /k/bzImage --modules /k/modules --memory 640M --size 32M --runs 1 \
             --boot-limit 75s --fio {job} --vmm ringvm 2>&1"
        );
        let said = match started(lab, &command) {
            Err(Error::Command { output, .. }) => output,
            other => panic!("it should have failed: {other:?}"),
        };
        assert!(said.contains("measuring ringvm: fio a: ") && said.contains("nonsense"), "{said}");
        Ok(())
    });
}
