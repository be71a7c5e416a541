//! scratch
use ringvm_tests::lab::{lab, vm};
fn main() {
    lab(|lab| {
        let cpus: u32 = std::env::var("CPUS").map_or(1, |v| v.parse().unwrap());
        let mut machine = vm().cpus(cpus);
        for a in std::env::var("ARGS").unwrap_or_default().split_whitespace() { machine = machine.arg(a); }
        if std::env::var("FIO").is_ok() { machine = machine.fio(); }
        for c in std::env::var("PRE").unwrap_or_default().split('|').filter(|c| !c.is_empty()) {
            println!("L1> {c}\n{:?}", lab.run(c));
        }
        let mut guest = lab.boot(&machine)?;
        for c in std::env::args().skip(1) {
            match c.strip_prefix("L1:") {
                Some(c) => println!("L1> {c}\n{}", lab.run(c).unwrap_or_else(|e| e.to_string())),
                None => println!("> {c}\n{}", guest.run(&c).unwrap_or_else(|e| e.to_string())),
            }
        }
        println!("{:?}\n--- stderr\n{}", guest.power_off()?, guest.stderr());
        Ok(())
    });
}
