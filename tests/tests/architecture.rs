//! The arrows of the architecture, read from `cargo metadata` and the sources: `vmm -> backends <- vhost-daemons`, the programs
//! also on `backends/cli` and the wire between them, what each may not see, and that the modules of each lie in layers.

#[path = "architecture/modules.rs"]
mod modules;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, PackageId};
use modules::Modules;
use ringvm_tests::paths;

const BACKENDS: &str = "ringvm-backends";
const BENCH: &str = "ringvm-bench";
const CLI: &str = "ringvm-cli";
const DAEMONS: &str = "ringvm-vhost-daemons";
const HOSTED: &str = "ringvm-hosted";
const TESTS: &str = "ringvm-tests";
const VMM: &str = "ringvm";
const WIRE: &str = "ringvm-vhost-user";

/// Crates of the rust-vmm project and their kin, whose types meet at our seams: two versions of one don't fit together.
const ONE_VERSION: [&str; 17] = [
    "acpi_tables",
    "event-manager",
    "io-uring",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "seccompiler",
    "vfio-bindings",
    "vhost",
    "vhost-user-backend",
    "virtio-bindings",
    "virtio-queue",
    "virtio-vsock",
    "vm-allocator",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

/// tokio-uring 0.5, whose last release is of 2024, is built on io-uring 0.6; ours is 0.7. No type of it crosses a seam.
const TWO_BY_UPSTREAM: [&str; 1] = ["io-uring"];

/// Most lines of a file that is not for tests.
const MOST_LINES: usize = 600;

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(paths::workspace().join("Cargo.toml"))
        .other_options(
            ["--locked", "--offline", "--filter-platform", "x86_64-unknown-linux-gnu"].map(String::from).to_vec(),
        )
        .exec()
        .expect("cargo metadata of the workspace")
}

/// Which other packages of ours each package of ours names as a dependency of any kind. For its own tests a package may name
/// itself, with more features.
fn arrows(metadata: &Metadata) -> BTreeMap<&str, BTreeSet<&str>> {
    let ours: BTreeSet<&str> = metadata.workspace_packages().iter().map(|package| package.name.as_str()).collect();
    let of = |package: &&Package| -> BTreeSet<&str> {
        let names = ours.iter().copied();
        let others = names.filter(|name| package.name != name);
        others.filter(|name| package.dependencies.iter().any(|dependency| dependency.name == *name)).collect()
    };
    metadata.workspace_packages().iter().map(|package| (package.name.as_str(), of(package))).collect()
}

/// All packages that end up in a build of this one: dependencies of dependencies, not those for tests.
fn closure<'a>(metadata: &'a Metadata, name: &str) -> BTreeSet<&'a str> {
    let resolve = metadata.resolve.as_ref().expect("cargo metadata resolves");
    let nodes: BTreeMap<&PackageId, _> = resolve.nodes.iter().map(|node| (&node.id, node)).collect();
    let packages = metadata.workspace_packages();
    let root = packages.iter().find(|package| package.name.as_str() == name).expect("a package of ours");
    let mut seen = BTreeSet::new();
    let mut open = vec![&root.id];
    while let Some(id) = open.pop() {
        let Some(node) = nodes.get(id) else { continue };
        for dependency in &node.deps {
            let built = dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development);
            if built && seen.insert(&dependency.pkg) {
                open.push(&dependency.pkg);
            }
        }
    }
    seen.into_iter().map(|id| metadata[id].name.as_str()).collect()
}

#[test]
fn the_arrows_are_those_of_the_architecture() {
    let metadata = metadata();
    let arrows = arrows(&metadata);
    let set = |names: &[&'static str]| -> BTreeSet<&str> { names.iter().copied().collect() };
    assert_eq!(
        arrows.keys().copied().collect::<BTreeSet<_>>(),
        set(&[BACKENDS, BENCH, CLI, DAEMONS, HOSTED, TESTS, VMM, WIRE])
    );
    assert_eq!(arrows[BACKENDS], set(&[]), "backends know nobody");
    assert_eq!(arrows[CLI], set(&[BACKENDS]));
    assert_eq!(arrows[HOSTED], set(&[BACKENDS]));
    assert_eq!(arrows[VMM], set(&[BACKENDS, CLI, HOSTED, WIRE]));
    assert_eq!(arrows[WIRE], set(&[]), "the wire knows no device");
    assert_eq!(arrows[DAEMONS], set(&[BACKENDS, CLI, HOSTED, WIRE]));
    assert!(arrows[BENCH].is_subset(&set(&[BACKENDS, CLI, DAEMONS, VMM])), "{:?}", arrows[BENCH]);
    assert!(!arrows[TESTS].contains(TESTS));
}

#[test]
fn each_package_sees_only_what_is_its_own() {
    let metadata = metadata();
    for (package, hidden) in [
        (
            BACKENDS,
            &["clap", "kvm-ioctls", "kvm-bindings", "signal-hook", "tracing-subscriber", "vhost", "vhost-user-backend"]
                [..],
        ),
        (CLI, &["kvm-ioctls", "kvm-bindings", "vhost"]),
        (DAEMONS, &["kvm-ioctls", "kvm-bindings"]),
        (WIRE, &["kvm-ioctls", "kvm-bindings", "virtio-bindings", "vhost-user-backend"]),
        (HOSTED, &["kvm-ioctls", "kvm-bindings", CLI]),
        (VMM, &[DAEMONS]),
    ] {
        let closure = closure(&metadata, package);
        assert!(!closure.is_empty() || package == DAEMONS, "{package} is built of something");
        for name in hidden {
            assert!(!closure.contains(name), "{package} depends on {name}, if only by way of another crate");
        }
    }
    for package in metadata.workspace_packages() {
        let names = |crate_name: &str| package.dependencies.iter().any(|dependency| dependency.name == crate_name);
        let name = package.name.as_str();
        assert_eq!(names("kvm-ioctls"), name == VMM, "{name} and kvm-ioctls");
        // The tests have a server of others' made of it.
        assert_eq!(names("vhost-user-backend"), [HOSTED, TESTS].contains(&name), "{name} and vhost-user-backend");
    }
}

#[test]
fn only_the_kvm_module_mentions_kvm_ioctls() {
    let workspace = paths::workspace();
    let kvm = workspace.join("vmm/src/kvm");
    let (mut inside, mut scanned) = (0, 0);
    for folder in ["vmm", "backends", "vhost-daemons", "bench"] {
        for file in sources(&workspace.join(folder)) {
            let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            scanned += 1;
            if !text.contains("kvm_ioctls") {
                continue;
            }
            assert!(file.starts_with(&kvm), "{} mentions kvm_ioctls", file.display());
            inside += 1;
        }
    }
    assert!(inside > 0 && scanned > inside, "{inside} of {scanned} files: the scan looks in the wrong place");
}

#[test]
fn what_tests_call_a_pitfall_is_described() {
    let workspace = paths::workspace();
    let described = fs::read_to_string(workspace.join("docs/pitfalls.md")).expect("docs/pitfalls.md is there");
    let described: BTreeSet<u32> =
        described.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok()).collect();
    let mut named = BTreeSet::new();
    for folder in ["vmm", "backends", "vhost-daemons", "bench", "tests"] {
        for file in sources(&workspace.join(folder)) {
            let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            for name in text.split("pitfall").skip(1) {
                let numbers = name.strip_prefix('s').unwrap_or(name).split('_').skip(1).filter(|part| *part != "and");
                named.extend(numbers.map_while(|part| part.parse::<u32>().ok()));
            }
        }
    }
    assert!(named.len() > 30, "{} numbers: the scan looks in the wrong place", named.len());
    let unknown: Vec<_> = named.difference(&described).collect();
    assert!(unknown.is_empty(), "docs/pitfalls.md does not describe {unknown:?}");
}

/// The root files of our crates and programs, with a name for each. The embedded guest is none of the workspace.
fn roots() -> Vec<(String, PathBuf)> {
    let metadata = metadata();
    let targets = metadata.workspace_packages().into_iter().flat_map(|package| &package.targets);
    let roots = targets.filter(|target| target.is_lib() || target.is_bin());
    let mut roots: Vec<_> =
        roots.map(|target| (target.name.replace('-', "_"), target.src_path.clone().into())).collect();
    roots.push(("guest".to_owned(), paths::workspace().join("bench/guest/src/main.rs")));
    roots
}

#[test]
fn modules_do_not_depend_on_each_other_in_circles() {
    let workspace = paths::workspace();
    let (mut circles, mut count) = (Vec::new(), 0);
    for (name, root) in roots() {
        // Files are named as they lie in the workspace.
        let root = root.strip_prefix(&workspace).expect("sources are in the workspace");
        let modules = Modules::read(root, &|path| fs::read_to_string(workspace.join(path)).ok());
        count += modules.count();
        circles.extend(modules.circles().into_iter().map(|circle| format!("{name}, {circle}")));
    }
    assert!(count > 200, "{count} modules: the scan looks in the wrong place");
    assert!(circles.is_empty(), "modules depend on each other in circles:\n{}", circles.join("\n"));
}

#[test]
fn no_file_has_grown_beyond_what_one_job_needs() {
    let workspace = paths::workspace();
    let mut scanned = 0;
    let mut long = Vec::new();
    for (_, root) in roots() {
        for file in sources(root.parent().expect("a root file is in a folder")) {
            let inside = file.strip_prefix(&workspace).expect("sources are in the workspace");
            let name = inside.file_stem().unwrap_or_default().to_string_lossy();
            if name == "tests"
                || name.ends_with("_tests")
                || inside.components().skip(2).any(|c| c.as_os_str() == "tests")
            {
                continue;
            }
            let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            let tests = ["mod tests {", "pub(crate) mod tests {"].map(|tests| format!("#[cfg(test)]\n{tests}"));
            let code = tests.iter().filter_map(|tests| text.split_once(tests)).next().map_or(&*text, |(code, _)| code);
            let lines = code.lines().count();
            scanned += 1;
            if lines > MOST_LINES {
                long.push(format!("{}: {lines} lines", inside.display()));
            }
        }
    }
    long.sort();
    long.dedup();
    assert!(scanned > 200, "{scanned} files: the scan looks in the wrong place");
    assert!(long.is_empty(), "more than {MOST_LINES} lines, so more than one job:\n{}", long.join("\n"));
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files = Vec::new();
    for path in entries.map(|entry| entry.expect("an entry of the sources").path()) {
        if path.is_dir() && !path.ends_with("target") {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn there_is_one_version_of_each_rust_vmm_crate() {
    let metadata = metadata();
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for package in &metadata.packages {
        if ONE_VERSION.contains(&package.name.as_str()) {
            versions.entry(package.name.as_str()).or_default().insert(package.version.to_string());
        }
    }
    assert!(versions.contains_key("vm-memory") && versions.contains_key("kvm-ioctls"), "{versions:?}");
    for (name, versions) in versions {
        let allowed = if TWO_BY_UPSTREAM.contains(&name) { 2 } else { 1 };
        assert!(versions.len() <= allowed, "{name} in versions {versions:?}");
    }
}
