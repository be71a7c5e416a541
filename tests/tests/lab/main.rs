//! Tests in the nested lab: a stock Debian kernel under real AMD SVM. One file per
//! capability.

mod bench;
mod boot;
mod console;
mod daemon;
mod devices;
mod durability;
mod file_sharing;
mod filesystem;
mod fio;
mod host_failures;
mod hosted;
mod lifecycle;
mod net;
