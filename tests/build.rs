//! Finds the tests in the package of `vhost-user-backend`, whose mock backend a test of ours serves.

use cargo_metadata::MetadataCommand;

fn main() {
    let target = std::env::var("TARGET").expect("cargo says what it builds for");
    let metadata = |offline: &[&str]| {
        let options = [&["--locked", "--filter-platform", &target], offline].concat();
        let mut command = MetadataCommand::new();
        command.manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
        command.other_options(options.into_iter().map(String::from).collect::<Vec<_>>()).exec()
    };
    // A build that needs no tests has not downloaded what only they depend on.
    let metadata = metadata(&["--offline"]).or_else(|_| metadata(&[]));
    let metadata = metadata.unwrap_or_else(|error| panic!("cargo metadata of the workspace: {error}"));
    let package = metadata.packages.iter().find(|package| package.name.as_str() == "vhost-user-backend");
    let manifest = &package.expect("a dependency of the workspace").manifest_path;
    println!("cargo:rustc-env=UPSTREAM_TESTS={}", manifest.with_file_name("tests").join("vhost-user-server.rs"));
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=../Cargo.lock");
}
