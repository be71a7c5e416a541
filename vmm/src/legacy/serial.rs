//! The first serial port: a 16550 of vm-superio between the port I/O bus and the console.

use std::io;
use std::sync::{Arc, Mutex};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::IRQ_COM1;
use crate::bus::BusDevice;
use crate::console::{Console, InputPort, Shared};
use crate::platform::Platform;

/// The UART.
pub struct SerialPort {
    uart: Serial<Edge, Host, Host>,
}

/// The interrupt line: an edge per event, as ISA has it.
struct Edge(EventFd);

impl Trigger for Edge {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The console at the other end of the port, if any.
#[derive(Clone)]
struct Host(Option<Arc<Shared>>);

impl io::Write for Host {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if let Some(console) = &self.0 {
            for &byte in data {
                console.put(byte);
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialEvents for Host {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if let Some(console) = &self.0 {
            console.input_wanted();
        }
    }
}

impl SerialPort {
    /// A port whose other end is `console`, or nothing.
    ///
    /// # Errors
    /// When its interrupt can't be wired.
    pub fn new(console: Option<&Console>, platform: &dyn Platform) -> io::Result<Arc<Mutex<Self>>> {
        let host = Host(console.map(Console::shared));
        let edge = Edge(platform.edge(IRQ_COM1)?);
        let port = Arc::new(Mutex::new(Self { uart: Serial::with_events(edge, host.clone(), host) }));
        if let Some(console) = console {
            console.attach(&(Arc::clone(&port) as _));
        }
        Ok(port)
    }
}

impl InputPort for SerialPort {
    fn receive(&mut self, input: &[u8]) -> usize {
        // The errors are a full FIFO and an interrupt event that is pending anyway.
        self.uart.enqueue_raw_bytes(input).unwrap_or(0)
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // Registers are bytes: a wider access has no meaning on this bus.
        if let [byte] = data {
            *byte = self.uart.read(offset as u8);
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if let &[byte] = data {
            // Output never fails (see `Host`), and an interrupt event that is full is pending.
            drop(self.uart.write(offset as u8, byte));
        }
    }
}
