//! Parts of a PC since 1981 that guests still look for: serial port, clock, reset.

pub mod acpi;
pub mod i8042;
pub mod rtc;
pub mod serial;
