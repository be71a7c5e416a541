//! Lines of text on the first serial port (16550A at 0x3f8), and whether anything has come in over it.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::machine::port::{in8, out8};

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// The transmit FIFO's depth: the status is asked for once per this many bytes, each look being an exit.
const FIFO: usize = 16;
/// How often a full transmitter is looked at before the bytes are sent all the same.
const PATIENCE: usize = 20_000;
const LINE: usize = 1024;

static BUSY: AtomicBool = AtomicBool::new(false);

/// 8 bits, no parity, one stop bit, FIFO on, no interrupts.
pub fn init() {
    out8(INTERRUPT_ENABLE, 0);
    out8(LINE_CONTROL, 0x03);
    out8(FIFO_CONTROL, 0x01);
}

/// One line, put together before it is sent so that vCPUs do not mix theirs.
struct Line {
    bytes: [u8; LINE],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte stays free for the end of the line; what does not fit is cut off.
        for &byte in text.as_bytes().iter().take(LINE - 1 - self.len) {
            self.bytes[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// Sends one line.
pub fn line(text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; LINE], len: 0 };
    let _ = line.write_fmt(text);
    line.bytes[line.len] = b'\n';
    let mut waited = 0_usize;
    // A vCPU that died with the lock must not keep the others silent: the wait has a bound.
    while BUSY.swap(true, Ordering::Acquire) && waited < 100_000_000 {
        waited += 1;
        core::hint::spin_loop();
    }
    for chunk in line.bytes[..=line.len].chunks(FIFO) {
        let mut looks = 0;
        while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 && looks < PATIENCE {
            looks += 1;
        }
        for &byte in chunk {
            out8(DATA, byte);
        }
    }
    BUSY.store(false, Ordering::Release);
}

/// Whether a byte has come in since the start. Each look is an exit.
pub fn heard() -> bool {
    // The byte stays where it is: nobody takes it.
    in8(LINE_STATUS) & DATA_READY != 0
}

/// Prints a line that starts with the guest's name.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::machine::serial::line(format_args!("ringvm-guest: {}", format_args!($($text)*))) };
}
