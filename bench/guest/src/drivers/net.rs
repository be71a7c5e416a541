//! A NIC from its driver's side: bringing it up with so many queue pairs, receive rings that are kept full of buffers,
//! transmit rings whose slots have memory of their own. Virtio 1.3, section 5.1.

use alloc::vec::Vec;

use crate::drivers::blk::{self, Irq};
use crate::drivers::queue::{NEXT, Queue, WRITE, write_descriptor};
use crate::drivers::virtio::{self, Transport};
use crate::job::Options;
use crate::machine::mem::{self, Region};
use crate::machine::sync::Lock;
use crate::machine::{clock, fail, smp};
use crate::spec;

pub use crate::shared::packet::{ETHERNET, HEADER};

/// VIRTIO_NET_F_CSUM.
pub const F_CSUM: u64 = 1 << 0;
/// VIRTIO_NET_F_MAC.
pub const F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_HOST_TSO4.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// VIRTIO_NET_F_MRG_RXBUF.
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_CTRL_VQ.
pub const F_CTRL_VQ: u64 = 1 << 17;
/// VIRTIO_NET_F_MQ.
pub const F_MQ: u64 = 1 << 22;

/// The longest frame that a driver may meet, whatever the MTU: 64 KiB of IP, addresses, type and a VLAN tag.
pub const LONGEST: usize = 65_535 + 18;

/// Where the header lies in a slot, so that the frame behind it begins on a multiple of 16.
const HEADER_AT: usize = 4;
const FRAME_AT: usize = HEADER_AT + HEADER;
const NUM_BUFFERS: usize = 10;
const CONFIG_MAX_PAIRS: usize = 8;

const CTRL_MQ: u8 = 4;
const CTRL_MQ_VQ_PAIRS_SET: u8 = 0;
const CTRL_OK: u8 = 0;
const CTRL_UNSET: u8 = 0xff;
/// Where the answer to a control command lies behind the command.
const ANSWER: usize = 64;

/// A NIC at work.
pub struct Nic {
    /// The device.
    pub transport: Transport,
    /// Its address, or one of ours if it has none.
    pub mac: [u8; 6],
    /// What was agreed on.
    pub features: u64,
    /// The queue pairs in use.
    pub pairs: Vec<Lock<Pair>>,
    /// The vectors of the vCPUs that drive them, by turns; none if they are polled.
    irqs: Vec<Irq>,
}

/// A receive queue and a transmit queue.
pub struct Pair {
    /// Its number.
    pub index: u16,
    /// Frames that come.
    pub rx: Receive,
    /// Frames that go.
    pub tx: Transmit,
}

impl Pair {
    /// How often the device was notified for this pair.
    pub fn kicks(&self) -> u64 {
        self.rx.queue.kicks + self.tx.queue.kicks
    }

    /// Its queues, for whoever waits for them.
    pub fn queues(&mut self) -> [&mut Queue; 2] {
        [&mut self.rx.queue, &mut self.tx.queue]
    }
}

impl Nic {
    /// Brings up the first NIC for frames of up to `longest` bytes, and the vCPUs that will drive it.
    pub fn open(options: &Options, longest: usize) -> Self {
        Self::open_nth(0, options, longest)
    }

    /// The same with the NIC of this index.
    pub fn open_nth(nth: usize, options: &Options, longest: usize) -> Self {
        let mut nics = virtio::devices().into_iter().filter(|&(kind, _)| kind == virtio::NET);
        let Some((kind, function)) = nics.nth(nth) else {
            fail(format_args!("find where=pci expected=virtio-net:{nth} got=fewer-nics"))
        };
        let transport = Transport::new(kind, function);
        let count = options.queues.unwrap_or(1);
        let features = transport.negotiate(wanted(options, count));
        let largest = if features & F_MQ != 0 { transport.config.read::<u16>(CONFIG_MAX_PAIRS) } else { 1 };
        if count > largest {
            fail(format_args!("pairs where=device expected=at-most-{largest} got={count}"));
        }
        if options.tso && features & F_HOST_TSO4 == 0 {
            fail(format_args!("features where=device expected=HOST_TSO4 got={features:#x}"));
        }
        let mac = if features & F_MAC != 0 {
            core::array::from_fn(|at| transport.config.read::<u8>(at))
        } else {
            [0x52, 0x54, 0, 0, 0, 1]
        };
        let event_idx = features & spec::RING_EVENT_IDX != 0;
        let merges = features & F_MRG_RXBUF != 0;
        // Without merging each buffer has to hold whatever may come.
        let room = if merges { options.bs } else { HEADER + longest };
        smp::start(options.cpus);
        let irqs = if options.irq { route(&transport, options.cpus.min(usize::from(count))) } else { Vec::new() };
        let enable = |index: u16, pair: u16| {
            let vector = (!irqs.is_empty()).then(|| irqs[usize::from(pair) % irqs.len()].entry);
            transport.enable_queue(index, options.queue_size, vector, event_idx)
        };
        let mut pairs: Vec<Pair> = (0..count)
            .map(|index| Pair {
                index,
                rx: Receive::new(enable(index * 2, index), room, merges),
                tx: Transmit::new(enable(index * 2 + 1, index), options.depth, longest),
            })
            .collect();
        let control = (count > 1).then(|| transport.enable_queue(largest * 2, 0, None, event_idx));
        transport.start();
        pairs.iter_mut().for_each(|pair| pair.rx.publish());
        if let Some(mut control) = control {
            set_pairs(&mut control, count, options.stall_ms);
        }
        Self { transport, mac, features, pairs: pairs.into_iter().map(Lock::new).collect(), irqs }
    }

    /// The vector of the pairs that this vCPU drives; `None` if they are polled.
    pub fn irq(&self, cpu: usize) -> Option<Irq> {
        self.irqs.get(cpu).copied()
    }
}

/// A vector for each vCPU that drives pairs, which share it: one count tells a vCPU whether it may sleep.
fn route(transport: &Transport, cpus: usize) -> Vec<Irq> {
    let Some(msix) = transport.msix else {
        fail(format_args!("msix where=device expected=a-vector-per-vcpu got=no-msix"))
    };
    let irqs = (0..cpus).map(|cpu| Irq { index: blk::CONFIG_IRQ.index + 1 + cpu, entry: 1 + cpu as u16 });
    irqs.enumerate()
        .map(|(cpu, irq)| {
            msix.route(irq.entry, smp::apic_id(cpu), irq.index);
            irq
        })
        .collect()
}

fn wanted(options: &Options, pairs: u16) -> u64 {
    let mut wanted = F_MAC;
    for (on, bits) in [
        (options.event_idx, spec::RING_EVENT_IDX),
        (options.mrg, F_MRG_RXBUF),
        (options.tso, F_CSUM | F_HOST_TSO4),
        (pairs > 1, F_CTRL_VQ | F_MQ),
    ] {
        wanted |= if on { bits } else { 0 };
    }
    wanted
}

/// Has frames spread over so many pairs (5.1.6.5.5).
fn set_pairs(control: &mut Queue, count: u16, stall_ms: u64) {
    let [low, high] = count.to_le_bytes();
    let command = [CTRL_MQ, CTRL_MQ_VQ_PAIRS_SET, low, high];
    let memory = mem::dma(ANSWER + 1, 64);
    memory.copy_in(0, &command);
    memory.write(ANSWER, CTRL_UNSET);
    write_descriptor(control.layout.desc, 0, memory.base(), command.len() as u32, NEXT, 1);
    write_descriptor(control.layout.desc, 1, memory.base() + ANSWER, 1, WRITE, 0);
    control.offer(0);
    control.publish();
    let start = clock::ticks();
    while control.next_used().is_none() {
        core::hint::spin_loop();
        if clock::ticks().wrapping_sub(start) > clock::from_ms(stall_ms) {
            fail(format_args!("stall where=control-queue expected=an-answer got=none"));
        }
    }
    let answer: u8 = memory.read(ANSWER);
    if answer != CTRL_OK {
        fail(format_args!("control where=pairs:{count} expected={CTRL_OK} got={answer}"));
    }
}

/// A receive queue. Each descriptor is a buffer of its own, which goes back to the device once its frame was looked at.
pub struct Receive {
    /// The ring, for whoever waits for it.
    pub queue: Queue,
    buffers: Region,
    stride: usize,
    room: usize,
    merges: bool,
}

impl Receive {
    fn new(mut queue: Queue, room: usize, merges: bool) -> Self {
        let size = queue.layout.size;
        let stride = room.next_multiple_of(64);
        let buffers = mem::dma(usize::from(size) * stride, 4096);
        for head in 0..size {
            let address = buffers.base() + usize::from(head) * stride;
            write_descriptor(queue.layout.desc, head, address, room as u32, WRITE, 0);
            queue.offer(head);
        }
        Self { queue, buffers, stride, room, merges }
    }

    /// Takes the next frame: `part` is shown the pieces of it in order. Returns its length; `None` if there is no frame.
    /// Its buffers are the device's again at the next [`Receive::publish`].
    #[inline(always)]
    pub fn next(&mut self, mut part: impl FnMut(Region)) -> Option<usize> {
        let (head, len) = self.queue.next_used()?;
        let first = self.buffer(head, len);
        if first.len() < HEADER {
            fail(format_args!("used-length where=queue:{} expected=at-least-{HEADER} got={len}", self.queue.index));
        }
        // No offload of the receiving side was agreed to, so that a header has nothing to say.
        let said = [first.read::<u32>(0), first.read::<u32>(4), u32::from(first.read::<u16>(8))];
        if said != [0; 3] {
            fail(format_args!("header where=queue:{} expected=zeroes got={said:x?}", self.queue.index));
        }
        let count: u16 = first.read(NUM_BUFFERS);
        if count == 0 || count != 1 && !self.merges {
            fail(format_args!("num_buffers where=queue:{} expected=1 got={count}", self.queue.index));
        }
        let mut total = first.len() - HEADER;
        part(first.sub(HEADER, total));
        self.queue.offer(head as u16);
        for index in 1..count {
            let Some((head, len)) = self.queue.next_used() else {
                fail(format_args!(
                    "num_buffers where=queue:{} expected={count}-buffers-at-once got={index}",
                    self.queue.index
                ))
            };
            let buffer = self.buffer(head, len);
            total += buffer.len();
            part(buffer);
            self.queue.offer(head as u16);
        }
        Some(total)
    }

    /// What the device has written to a buffer.
    #[inline(always)]
    fn buffer(&self, head: u32, len: u32) -> Region {
        let (head, len) = (head as usize, len as usize);
        if head >= usize::from(self.queue.layout.size) || len == 0 || len > self.room {
            fail(format_args!(
                "used where=queue:{} expected=a-buffer-of-{} got={head},len:{len}",
                self.queue.index, self.room
            ));
        }
        self.buffers.sub(head * self.stride, len)
    }

    /// Gives the buffers of taken frames back to the device.
    #[inline(always)]
    pub fn publish(&mut self) {
        self.queue.keep_quiet();
        self.queue.publish();
    }
}

/// A transmit queue. Each descriptor is a slot with memory for a header and a frame.
pub struct Transmit {
    /// The ring, for whoever makes chains of another kind.
    pub queue: Queue,
    memory: Region,
    stride: usize,
    free: Vec<u16>,
    slots: u16,
    /// Which slots the device has.
    sent: Vec<bool>,
}

impl Transmit {
    fn new(queue: Queue, depth: usize, longest: usize) -> Self {
        let slots = depth.min(usize::from(queue.layout.size));
        let stride = (FRAME_AT + longest).next_multiple_of(64);
        let memory = mem::dma(slots * stride, 4096);
        let slots = slots as u16;
        Self {
            queue,
            memory,
            stride,
            free: (0..slots).rev().collect(),
            slots,
            sent: alloc::vec![false; usize::from(slots)],
        }
    }

    /// How many slots there are.
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// Whether the device has returned all that was sent.
    pub fn is_idle(&self) -> bool {
        self.queue.in_flight() == 0
    }

    /// Takes what the device has returned; returns how many frames that was.
    #[inline(always)]
    pub fn reap(&mut self) -> u64 {
        let mut count = 0;
        while let Some((head, len)) = self.queue.next_used() {
            let Some(sent) = self.sent.get_mut(head as usize).filter(|sent| **sent) else {
                fail(format_args!("used where=queue:{} expected=a-head-in-flight got={head}", self.queue.index))
            };
            if len != 0 {
                fail(format_args!("used-length where=queue:{} expected=0 got={len}", self.queue.index));
            }
            *sent = false;
            self.free.push(head as u16);
            count += 1;
        }
        self.queue.keep_quiet();
        count
    }

    /// A slot that is free.
    #[inline(always)]
    pub fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// A slot's header.
    #[inline(always)]
    pub fn header(&self, slot: u16) -> Region {
        self.memory.sub(usize::from(slot) * self.stride + HEADER_AT, HEADER)
    }

    /// A slot's room for a frame, on a multiple of 16.
    #[inline(always)]
    pub fn frame(&self, slot: u16) -> Region {
        self.memory.sub(usize::from(slot) * self.stride + FRAME_AT, self.stride - FRAME_AT)
    }

    /// Offers a taken slot with a frame of `len` bytes; the device sees it at the next [`Transmit::publish`].
    #[inline(always)]
    pub fn send(&mut self, slot: u16, len: usize) {
        let header = self.header(slot);
        write_descriptor(self.queue.layout.desc, slot, header.base(), (HEADER + len) as u32, 0, 0);
        self.sent[usize::from(slot)] = true;
        self.queue.offer(slot);
    }

    /// Shows the device what was sent.
    #[inline(always)]
    pub fn publish(&mut self) {
        self.queue.publish();
    }
}
