//! A gate that a busy machine can't blur: instructions per request, counted by callgrind in the optimised build, held against
//! `tests/instructions.toml`. A request's way is single-threaded and its instructions are counted over the difference of two
//! runs, so neither starting nor waiting is in the figure, and it comes out the same each time.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use ringvm_tests::host::{Need, need, say};
use ringvm_tests::paths;
use serde::Deserialize;

const PROGRAM: &str = "instructions";
/// Its function that is counted.
const COUNTED: &str = "instructions::counted";
/// Requests of the two runs.
const COUNTS: [u32; 2] = [3_200, 9_600];
/// What a compiler of another version may change in per cent before somebody has to look.
const MARGIN_OF_ANOTHER_COMPILER: f64 = 25.0;
/// In seconds; only a hang takes it.
const PATIENCE: &str = "120";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Baseline {
    /// The version of the compiler that built what was counted.
    rustc: String,
    /// By how much a figure may change, in per cent.
    margin: f64,
    /// Instructions per request, by its kind.
    instructions: BTreeMap<String, f64>,
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Within,
    /// The baseline can be lowered.
    Better,
    Worse,
}

fn verdict(figure: f64, baseline: f64, margin: f64, allowed: f64) -> Verdict {
    let change = (figure / baseline - 1.0) * 100.0;
    if change > allowed {
        Verdict::Worse
    } else if change < -margin {
        Verdict::Better
    } else {
        Verdict::Within
    }
}

#[test]
fn a_request_takes_no_more_instructions_than_it_did() {
    if !(need(Need::Valgrind) && need(Need::IoUring)) {
        return;
    }
    let program = paths::release_binary(PROGRAM).unwrap_or_else(|e| panic!("{e}"));
    let path = paths::workspace().join("tests/instructions.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("reading {}: {e}", path.display()));
    let baseline: Baseline = toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let compiler = compiler_of(&program);
    let same = compiler == baseline.rustc;
    let allowed = if same { baseline.margin } else { MARGIN_OF_ANOTHER_COMPILER.max(baseline.margin) };

    let kinds = run(&mut Command::new(&program));
    let figures: BTreeMap<&str, f64> = kinds.lines().map(|kind| (kind, per_request(&program, kind))).collect();
    let known: Vec<_> = baseline.instructions.keys().map(String::as_str).collect();
    let counted: Vec<_> = figures.keys().copied().collect();

    let mut table = format!("instructions per request, built by rustc {compiler}\n");
    let mut paste = format!("rustc = \"{compiler}\"\nmargin = {}\n\n[instructions]\n", baseline.margin);
    let (mut worse, mut better) = (false, false);
    for (kind, figure) in &figures {
        let before = baseline.instructions.get(*kind).copied();
        let verdict = before.map_or(Verdict::Within, |before| verdict(*figure, before, baseline.margin, allowed));
        worse |= verdict == Verdict::Worse;
        better |= verdict == Verdict::Better;
        let before = before.map_or_else(
            || "not in the baseline".to_owned(),
            // Adding nothing makes a plain zero of a negative one.
            |before| {
                format!("baseline {before:7.1}  {:+6.1} %", ((figure / before - 1.0) * 1000.0).round() / 10.0 + 0.0)
            },
        );
        let mark = if verdict == Verdict::Within { "" } else { "  <--" };
        writeln!(table, "  {kind:<20} {figure:7.1}  {before}{mark}").expect("text grows");
        writeln!(paste, "{kind} = {figure:.1}").expect("text grows");
    }
    if !same {
        let built = &baseline.rustc;
        writeln!(table, "The baseline is of rustc {built}, so only changes beyond {allowed} % count.")
            .expect("text grows");
    }
    if better && same && !worse {
        writeln!(table, "Better than the baseline: lower it, so that it stays so. tests/instructions.toml:\n\n{paste}")
            .expect("text grows");
    }
    say(&table);
    assert_eq!(
        known, counted,
        "tests/instructions.toml has other kinds than `{PROGRAM}` counts; it would be\n\n{paste}"
    );
    assert!(
        !worse,
        "a request takes more instructions than tests/instructions.toml allows:\n{table}\nFind out why: valgrind \
         --tool=callgrind --toggle-collect={COUNTED} {} KIND {}, then callgrind_annotate. If it is worth it, write the new \
         figures down:\n\n{paste}",
        program.display(),
        COUNTS[1]
    );
}

/// Instructions of one request of a kind.
fn per_request(program: &Path, kind: &str) -> f64 {
    let [few, many] = COUNTS.map(|count| instructions(program, kind, count));
    assert!(many > few, "{kind}: {few} instructions for {} requests, {many} for {}", COUNTS[0], COUNTS[1]);
    (many - few) as f64 / f64::from(COUNTS[1] - COUNTS[0])
}

fn instructions(program: &Path, kind: &str, count: u32) -> u64 {
    let mut command = Command::new("timeout");
    command.args([PATIENCE, "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(format!("--toggle-collect={COUNTED}")).arg(program).args([kind, &count.to_string()]);
    let output = run(&mut command);
    let counted =
        output.lines().find_map(|line| line.split_once("Collected : ")).map(|(_, number)| number.trim().parse());
    let Some(Ok(counted)) = counted else { panic!("{command:?} did not say what it has counted:\n{output}") };
    assert_ne!(counted, 0, "{command:?}: there is no function {COUNTED}");
    counted
}

/// Runs a program to its end; what it wrote, to wherever.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("starting {command:?}: {e}"));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// The version of the compiler that built a program: it notes itself in what it makes.
fn compiler_of(program: &Path) -> String {
    const NOTE: &[u8] = b"rustc version ";
    let bytes = fs::read(program).unwrap_or_else(|e| panic!("reading {}: {e}", program.display()));
    let at = bytes.windows(NOTE.len()).position(|window| window == NOTE);
    let at = at.unwrap_or_else(|| panic!("{} does not say which compiler built it: stripped?", program.display()));
    let version = bytes[at + NOTE.len()..].iter().take_while(|byte| byte.is_ascii_graphic()).copied();
    String::from_utf8(version.collect()).expect("ASCII")
}

#[test]
fn figures_are_judged_by_the_margin() {
    assert_eq!(verdict(104.9, 100.0, 5.0, 5.0), Verdict::Within);
    assert_eq!(verdict(105.1, 100.0, 5.0, 5.0), Verdict::Worse);
    assert_eq!(verdict(95.1, 100.0, 5.0, 5.0), Verdict::Within);
    assert_eq!(verdict(94.9, 100.0, 5.0, 5.0), Verdict::Better);
    // Built by another compiler.
    assert_eq!(verdict(124.9, 100.0, 5.0, 25.0), Verdict::Within);
    assert_eq!(verdict(125.1, 100.0, 5.0, 25.0), Verdict::Worse);
    assert_eq!(verdict(94.9, 100.0, 5.0, 25.0), Verdict::Better);
}
