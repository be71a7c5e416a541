//! Says where the package `vhost-user-backend` has its own tests: one of ours has their backend served by us.

use cargo_metadata::MetadataCommand;

fn main() {
    let mut command = MetadataCommand::new();
    command.manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
    let metadata = command.other_options(["--locked", "--offline"].map(String::from).to_vec()).exec();
    let metadata = metadata.expect("cargo metadata of the workspace");
    let package = metadata.packages.iter().find(|package| package.name.as_str() == "vhost-user-backend");
    let manifest = &package.expect("a dependency of the workspace").manifest_path;
    println!("cargo:rustc-env=CRATES_OWN_TESTS={}", manifest.with_file_name("tests").join("vhost-user-server.rs"));
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=../Cargo.lock");
}
