//! The block device as a driver sees it, over real queues, I/O threads and images.

mod disk;

use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use disk::*;
use proptest::prelude::*;
use ringvm_backends::block::storage::Geometry;
use ringvm_backends::block::storage::raw::{DirectAlign, Raw};
use ringvm_backends::block::{BlockDevice, BlockOptions, OpenError, StorageKind};
use ringvm_backends::device::{Device, Suspended};
use ringvm_backends::testing::driver::{Buffer, Descriptor};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn requests_of_every_kind() {
    let mut rig = Rig::new(64, |options| options.serial = Some("a serial".into()));
    rig.fill(7, 1024);
    assert_eq!(rig.request(T_OUT, 2, 1024), (OK, 1));
    rig.fill(0, 1024);
    assert_eq!(rig.request(T_IN, 1, 1024), (OK, 1025));
    assert_eq!(rig.data(1024), [vec![0; 512], vec![7; 512]].concat());
    assert_eq!(rig.request(T_FLUSH, 0, 0), (OK, 1));
    assert_eq!(rig.request(T_GET_ID, 0, 20), (OK, 21));
    assert_eq!(&rig.data(20), b"a serial\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.segments(T_WRITE_ZEROES, &[(2, 1, 0), (3, 1, 1)]), OK);
    assert_eq!(rig.contents(), vec![0; 64 * 512]);
    let total = rig.device.stats().total().unwrap();
    let count = |name| total.ops.iter().find(|op| op.name == name).map(|op| (op.count, op.bytes, op.errors)).unwrap();
    assert_eq!(count("read"), (1, 1024, 0));
    assert_eq!(count("write_zeroes"), (1, 1024, 0));
    assert_eq!(total.latency.len(), 5);
    assert!(total.interrupts >= 1);
}

#[test]
fn pitfall_19_a_total_past_the_end_is_refused() {
    let mut rig = Rig::new(8, |_| {});
    assert_eq!(rig.request(T_IN, 7, 1024), (IOERR, 1));
    assert_eq!(rig.request(T_OUT, u64::MAX, 512), (IOERR, 1));
    assert_eq!(rig.request(T_IN, 0, 100), (IOERR, 1));
    assert_eq!(rig.request(T_IN, 7, 512), (OK, 513));
    assert_eq!(rig.contents().len(), 8 * 512);
}

#[test]
fn a_request_of_more_than_a_gibibyte_is_refused() {
    const MIB: u32 = 1 << 20;
    let null = |options: &mut BlockOptions| {
        (options.storage, options.path, options.size) = (StorageKind::Null, None, Some(1 << 40));
    };
    let mut rig = Rig::new(8, null);
    for (kind, last, expected) in [
        (T_IN, MIB, OK),
        (T_OUT, MIB, OK),
        (T_IN, MIB + 512, IOERR),
        (T_OUT, MIB + 512, IOERR),
        (T_IN, u32::MAX - 511, IOERR),
    ] {
        rig.write_header(HEADERS, kind, 0);
        // The same memory again and again.
        let data = (0..1024).map(|i| if i == 1023 { last } else { MIB });
        let data = data.map(|len| Buffer { addr: DATA, len: len.min(6 * MIB), writable: kind == T_IN });
        let header = Buffer { addr: HEADERS, len: 16, writable: false };
        let status = Buffer { addr: HEADERS + 16, len: 1, writable: true };
        let chain: Vec<_> = std::iter::once(header).chain(data).chain([status]).collect();
        rig.queues[0].driver.add_indirect(0x7_0000, &chain).unwrap();
        rig.kick(0);
        let (_, used) = rig.next_used(0);
        let read = if kind == T_IN && expected == OK { 1 << 30 } else { 0 };
        assert_eq!((rig.status(HEADERS), used), (expected, read + 1), "kind {kind}, {last}");
    }
}

#[test]
fn no_driver_that_reads_its_configuration_sends_more_than_is_served() {
    for queue_size in [4, 256, 1024] {
        let rig = Rig::new(8, |options| options.queue_size = queue_size);
        let field = |at| {
            let mut bytes = [0; 4];
            rig.device.read_config(at, &mut bytes);
            u64::from(u32::from_le_bytes(bytes))
        };
        let (size_max, seg_max) = (field(8), field(12));
        assert!(size_max >= 64 << 10 && size_max * seg_max <= 1 << 30, "{size_max} {seg_max}");
        for at in [36, 48] {
            let (sectors, segments) = (field(at), field(at + 4));
            assert!(sectors * segments * 512 <= 1 << 30, "{sectors} sectors in each of {segments} segments");
        }
    }
}

#[test]
fn pitfall_20_discard_gives_space_back_within_bounds() {
    let mut rig = Rig::new(4096, |_| {});
    rig.fill(1, 1 << 20);
    assert_eq!(rig.request(T_OUT, 0, 1 << 20).0, OK);
    assert_eq!(rig.request(T_FLUSH, 0, 0).0, OK);
    let blocks = |rig: &Rig| std::os::unix::fs::MetadataExt::blocks(&rig.image.as_file().metadata().unwrap());
    let before = blocks(&rig);
    assert_eq!(rig.segments(T_DISCARD, &[(0, 1024, 0), (1024, 512, 0)]), OK);
    assert!(blocks(&rig) + 1536 <= before + 16, "{before} -> {}", blocks(&rig));
    assert_eq!(rig.segments(T_DISCARD, &[(0, 1, 1)]), UNSUPP);
    assert_eq!(rig.segments(T_WRITE_ZEROES, &[(0, 1, 4)]), UNSUPP);
    assert_eq!(rig.segments(T_DISCARD, &[(u64::MAX / 256, 1, 0)]), IOERR);
    assert_eq!(rig.segments(T_DISCARD, &[(0, u32::MAX, 0)]), IOERR);
    assert_eq!(rig.segments(T_DISCARD, &[(0, 1, 0); 33]), IOERR);
    assert_eq!(rig.segments(T_DISCARD, &[]), IOERR);
}

#[test]
fn pitfall_21_read_only_holds_whatever_was_negotiated() {
    for mask in [u64::MAX, !F_RO] {
        let mut rig = Rig::with_features(8, mask, |options| options.readonly = true);
        rig.fill(9, 512);
        assert_eq!(rig.request(T_OUT, 0, 512), (IOERR, 1));
        assert_eq!(rig.segments(T_WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
        assert_eq!(rig.segments(T_DISCARD, &[(0, 1, 0)]), IOERR);
        assert_eq!(rig.request(T_FLUSH, 0, 0), (OK, 1));
        assert_eq!(rig.request(T_IN, 0, 512), (OK, 513));
        assert_eq!(rig.contents(), vec![0; 8 * 512]);
    }
}

#[test]
fn pitfall_31_scsi_and_unknown_types_are_unsupported() {
    let mut rig = Rig::new(8, |_| {});
    for kind in [2, 3, 5, 14, 16, 24, u32::MAX] {
        assert_eq!(rig.request(kind, 0, 512).0, UNSUPP, "type {kind}");
    }
}

#[test]
fn pitfall_32_seg_max_leaves_room_for_header_and_status() {
    for size in [4, 256, 1024] {
        let rig = Rig::new(8, |options| options.queue_size = size);
        let mut seg_max = [0; 4];
        rig.device.read_config(12, &mut seg_max);
        assert!(u32::from_le_bytes(seg_max) + 2 <= u32::from(size));
    }
}

#[test]
fn pitfall_7_bad_requests_are_answered_and_the_queue_goes_on() {
    let mut rig = Rig::new(8, |_| {});
    let status = Buffer { addr: HEADERS + 16, len: 1, writable: true };
    let bad: [&[Buffer]; 4] = [
        // No header, half a header, data outside memory, header outside memory.
        &[status],
        &[Buffer { addr: HEADERS, len: 8, writable: false }, status],
        &[
            Buffer { addr: HEADERS, len: 16, writable: false },
            Buffer { addr: 1 << 40, len: 512, writable: true },
            status,
        ],
        &[Buffer { addr: u64::MAX - 4, len: 16, writable: false }, status],
    ];
    for chain in bad {
        rig.write_header(HEADERS, T_IN, 0);
        rig.queues[0].driver.add(chain).unwrap();
        rig.kick(0);
        assert_eq!(rig.next_used(0).1, 1);
        assert_eq!(rig.status(HEADERS), IOERR);
    }
    assert_eq!(rig.request(T_IN, 0, 512), (OK, 513));
    assert_eq!(rig.faults.load(Ordering::SeqCst), 0);
}

#[test]
fn pitfalls_5_and_6_what_can_not_be_answered_needs_a_reset_and_spares_other_queues() {
    let mut rig = Rig::new(8, |options| options.queues = 2);
    // A request without room for a status, and one whose descriptors go in circles.
    for round in 0..2 {
        if round == 0 {
            rig.queues[0].driver.add(&[Buffer { addr: HEADERS, len: 16, writable: false }]).unwrap();
            rig.kick(0);
        } else {
            let ring = rig.queues[0].driver.ring();
            let circle = Descriptor { addr: HEADERS, len: 16, flags: 1, next: 0 };
            rig.queues[0].driver.write_descriptor(ring.desc, 0, circle);
            // The first entry was the request that closed the round before.
            rig.queues[0].driver.write_avail_entry(1, 0);
            rig.queues[0].driver.write_avail_index(2);
            rig.queues[0].kick.write(1).unwrap();
        }
        rig.wait_for_fault(round + 1);
        rig.write_header(HEADERS, T_IN, 0);
        let chain = [
            Buffer { addr: HEADERS, len: 16, writable: false },
            Buffer { addr: DATA, len: 512, writable: true },
            Buffer { addr: HEADERS + 16, len: 1, writable: true },
        ];
        rig.queues[1].driver.add(&chain).unwrap();
        rig.kick(1);
        rig.next_used(1);
        assert_eq!(rig.status(HEADERS), OK);
        assert_eq!(rig.faults.load(Ordering::SeqCst), round + 1, "raised once");
        rig.device.reset();
        rig.start(u64::MAX);
        assert_eq!(rig.request(T_IN, 0, 512), (OK, 513), "a reset brings the device back");
    }
}

#[test]
fn what_is_taken_together_with_a_request_that_breaks_the_queue_ends_as_what_is_in_flight_does() {
    let mut rig = Rig::new(8, |_| ());
    rig.fill(7, 512);
    for (slot, sector) in [(0, 0), (1, 1), (2, 2)] {
        let at = HEADERS + slot * 64;
        rig.write_header(at, T_OUT, sector);
        let chain = [
            Buffer { addr: at, len: 16, writable: false },
            Buffer { addr: DATA, len: 512, writable: false },
            Buffer { addr: at + 16, len: 1, writable: true },
        ];
        // The second has no room for a status.
        rig.queues[0].driver.add(if slot == 1 { &chain[..2] } else { &chain }).unwrap();
    }
    rig.kick(0);
    rig.wait_for_fault(1);
    let ends = [rig.next_used(0), rig.next_used(0)];
    assert_eq!((ends.map(|end| end.1), rig.status(HEADERS), rig.status(HEADERS + 128)), ([1, 1], OK, OK));
    rig.device.reset();
    assert_eq!(rig.faults.load(Ordering::SeqCst), 1, "raised once");
    let contents = rig.contents();
    assert!([0, 2].iter().all(|sector| contents[sector * 512..][..512] == [7; 512]), "both writes were done");
    assert!(contents[512..1024] != [7; 512], "what broke it was not");
    rig.start(u64::MAX);
    assert_eq!(rig.request(T_IN, 0, 512), (OK, 513), "a reset brings the device back");
}

#[test]
fn pitfall_4_a_driver_that_refills_does_not_starve_another_queue() {
    let options = |options: &mut BlockOptions| {
        (options.storage, options.path, options.size) = (StorageKind::Null, None, Some(1 << 20));
        (options.queues, options.queue_size) = (4, 4);
    };
    let mut rig = Rig::new(8, options);
    // Queues 0 and 2, or 1 and 3, share a thread. Three of them are never empty while the fourth is asked.
    rig.write_header(HEADERS, T_IN, 0);
    let chain =
        [Buffer { addr: HEADERS, len: 16, writable: false }, Buffer { addr: HEADERS + 16, len: 1, writable: true }];
    let mut answered = 0;
    let start = Instant::now();
    while answered < 200 {
        for queue in 0..3 {
            while rig.queues[queue].driver.add(&chain).is_some() {}
            rig.kick(queue);
            while rig.queues[queue].driver.next_used().is_some() {}
        }
        if rig.queues[3].driver.in_flight() == 0 {
            rig.queues[3].driver.add(&chain).unwrap();
            rig.kick(3);
        }
        answered += usize::from(rig.queues[3].driver.next_used().is_some());
        assert!(start.elapsed() < PATIENCE, "starved after {answered}");
    }
}

/// A disk whose storage takes blocks of 4 KiB only, so that the sectors that its driver writes are bounced.
fn in_blocks(queues: u16) -> Rig {
    const SECTORS: usize = 1 << 12;
    let image = image(SECTORS);
    let direct = libc::O_DIRECT;
    let file = std::fs::File::options().read(true).write(true).custom_flags(direct).open(image.path()).unwrap();
    let geometry = Geometry {
        capacity: (SECTORS * SECTOR) as u64,
        logical_block: 512,
        physical_block: 4096,
        readonly: false,
        discard: true,
    };
    let raw = Raw::new(Arc::new(file), geometry, Some(DirectAlign { memory: 4096, offset: 4096 }));
    let options = BlockOptions { queues, ..BlockOptions::default() };
    let device = BlockDevice::over("disk0", raw, &options, &pool(2));
    Rig::over(device, image, u64::MAX)
}

/// Where the requests that follow are: a header, a status and a data buffer of 512 bytes each.
const WRITES: u64 = 0x10_0000;

impl Rig {
    /// Offers a write of one sector that is filled with `fill`.
    fn offer_sector(&mut self, queue: usize, slot: u64, sector: u64, fill: u8) {
        let at = WRITES + slot * 1024;
        self.write_header(at, T_OUT, sector);
        self.mem.write_slice(&[fill; SECTOR], GuestAddress(at + 512)).unwrap();
        let chain = [
            Buffer { addr: at, len: 16, writable: false },
            Buffer { addr: at + 512, len: SECTOR as u32, writable: false },
            Buffer { addr: at + 16, len: 1, writable: true },
        ];
        self.queues[queue].driver.add(&chain).unwrap();
    }
}

#[test]
fn sectors_of_one_block_are_written_from_two_threads() {
    let mut rig = in_blocks(2);
    for round in 0..50 {
        // Eight sectors of each of four blocks, four in each queue.
        for slot in 0..32 {
            rig.offer_sector((slot % 2) as usize, slot, slot, round + slot as u8);
        }
        (0..2).for_each(|queue| rig.kick(queue));
        for slot in 0..32 {
            rig.next_used(slot % 2);
        }
        let contents = rig.contents();
        for slot in 0..32 {
            assert_eq!(rig.status(WRITES + slot * 1024), OK);
            assert_eq!(contents[slot as usize * SECTOR..][..SECTOR], [round + slot as u8; SECTOR], "{round}, {slot}");
        }
    }
}

#[test]
fn a_queue_is_stopped_while_its_requests_wait_for_those_of_another() {
    let mut rig = in_blocks(2);
    for round in 0..40 {
        // All in one block.
        for slot in 0..64 {
            rig.offer_sector((slot % 2) as usize, slot, slot % 8, round);
        }
        (0..2).for_each(|queue| rig.kick(queue));
        let queues: &[u16] = [&[0, 1][..], &[1], &[0]][usize::from(round % 3)];
        let ends = rig.device.suspend(queues);
        for (&queue, end) in queues.iter().zip(ends) {
            let Suspended { state, left } = end.expect("it ran");
            assert_eq!(state.next_avail.wrapping_sub(state.next_used), left.len() as u16);
            rig.start_queue_with(queue.into(), state, left);
        }
        if round % 2 == 0 {
            let state = rig.device.drain(1).unwrap();
            assert_eq!(state.next_used, state.next_avail, "nothing is in flight");
            rig.start_queue(1, state);
        }
        for slot in 0..64 {
            rig.next_used(slot % 2);
        }
        for slot in 0..64 {
            assert_eq!(rig.status(WRITES + slot * 1024), OK);
        }
        assert_eq!(rig.contents()[..8 * SECTOR], [round; 8 * SECTOR]);
    }
}

#[test]
fn pitfall_24_stopping_drains_and_another_start_goes_on() {
    let mut rig = Rig::new(4096, |options| options.direct = true);
    let mut done = 0;
    for round in 0..20u64 {
        for slot in 0..32u64 {
            let at = HEADERS + slot * 32;
            rig.write_header(at, T_OUT, (round * 32 + slot) % 4096);
            let chain = [
                Buffer { addr: at, len: 16, writable: false },
                Buffer { addr: DATA + slot * 512, len: 512, writable: false },
                Buffer { addr: at + 16, len: 1, writable: true },
            ];
            rig.queues[0].driver.add(&chain).unwrap();
        }
        rig.kick(0);
        let state = rig.device.drain(0).unwrap();
        assert_eq!(state.next_used, state.next_avail, "nothing is in flight");
        assert_eq!(rig.queues[0].driver.used_index(), state.next_used, "and all is published");
        assert_eq!(rig.device.drain(0), Some(state), "stopped once more, it stands where it stood");
        rig.start_queue(0, state);
        for _ in 0..32 {
            rig.next_used(0);
            done += 1;
        }
    }
    let writes = rig.device.stats().total().unwrap().ops[1];
    assert_eq!((writes.count, writes.errors, done), (640, 0, 640), "statistics outlive a stop");
}

#[test]
fn write_through_is_the_drivers_choice() {
    let mut rig = Rig::new(8, |_| {});
    rig.device.write_config(32, &[0]).unwrap();
    let mut writeback = [9];
    rig.device.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
    assert_eq!(rig.request(T_OUT, 0, 512), (OK, 1));
    assert_eq!(rig.segments(T_WRITE_ZEROES, &[(1, 2, 0)]), OK);
    for (offset, data) in [(32, &[2][..]), (31, &[1]), (0, &[0; 8]), (32, &[1, 1]), (u32::MAX, &[1])] {
        rig.device.write_config(offset, data).unwrap_err();
    }
    let mut rig = Rig::with_features(8, !F_CONFIG_WCE, |_| {});
    rig.device.write_config(32, &[0]).unwrap_err();
    let mut rig = Rig::with_features(8, !(F_CONFIG_WCE | F_FLUSH), |_| {});
    assert_eq!(rig.request(T_OUT, 0, 512), (OK, 1));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut rig = Rig::new(8, |_| {});
    rig.device.reset();
    let offered = rig.device.info().features;
    assert!(rig.device.ack_features(offered | 1 << 63).is_err());
    assert!(rig.device.ack_features(offered & !(1 << 32)).is_err(), "VERSION_1 is required");
    rig.device.ack_features(offered).unwrap();
}

#[test]
fn config_reads_of_any_offset_and_size() {
    let rig = Rig::new(8, |options| options.queues = 3);
    let mut whole = [0xff; 80];
    rig.device.read_config(0, &mut whole);
    assert_eq!(whole[..8], 8u64.to_le_bytes());
    assert_eq!(whole[34..36], 3u16.to_le_bytes());
    assert_eq!(whole[60..], [0; 20]);
    for offset in 0..90u32 {
        let mut part = [0xff; 8];
        rig.device.read_config(offset, &mut part);
        for (i, byte) in part.into_iter().enumerate() {
            assert_eq!(byte, whole.get(offset as usize + i).copied().unwrap_or(0));
        }
    }
    let mut part = [0xff; 8];
    rig.device.read_config(u32::MAX, &mut part);
    assert_eq!(part, [0; 8]);
}

fn refusal(change: impl FnOnce(&mut BlockOptions)) -> String {
    let image = image(8);
    let mut options = BlockOptions { path: Some(image.path().to_owned()), ..BlockOptions::default() };
    change(&mut options);
    let error = BlockDevice::open("disk0", &options, &pool(1)).map(drop).unwrap_err();
    let text = error.to_string();
    assert!(!text.contains('\n'), "one line: {text}");
    text
}

#[test]
fn images_that_can_not_be_used_are_refused_in_one_line() {
    let expect = |text: String, what: &str| assert!(text.contains(what), "{text:?} should say {what:?}");
    expect(refusal(|o| o.path = Some("/nowhere/x.img".into())), "disk /nowhere/x.img: opening the image: No such file");
    expect(refusal(|o| o.path = Some(scratch())), "it is a directory");
    expect(refusal(|o| o.path = Some("/dev/null".into())), "it is a special file");
    expect(refusal(|o| o.path = None), "path= is missing");
    expect(refusal(|o| o.size = Some(512)), "size= is for storage=null");
    expect(refusal(|o| o.storage = StorageKind::Null), "takes no path=");
    expect(refusal(|o| (o.storage, o.path) = (StorageKind::Null, None)), "needs a size=");
    expect(refusal(|o| o.queues = 0), "queues=0");
    expect(refusal(|o| o.queues = 65), "queues=65");
    expect(refusal(|o| o.queue_size = 100), "queue-size=100");
    expect(refusal(|o| o.queue_size = 2048), "queue-size=2048");
    expect(refusal(|o| o.block_size = Some(1000)), "block-size=1000");
    expect(refusal(|o| o.serial = Some("x".repeat(21))), "at most 20");
    expect(refusal(|o| o.serial = Some("\u{e9}".into())), "printable ASCII");
    let odd = tempfile::NamedTempFile::new_in(scratch()).unwrap();
    expect(refusal(|o| o.path = Some(odd.path().to_owned())), "its size is 0");
    odd.as_file().set_len(700).unwrap();
    expect(refusal(|o| o.path = Some(odd.path().to_owned())), "not a multiple of the block size 512; 1024 would be");
    odd.as_file().set_len(512).unwrap();
    let path = odd.path().to_owned();
    expect(refusal(move |o| (o.path, o.block_size) = (Some(path), Some(4096))), "block size 4096");
}

#[test]
fn pitfall_22_a_file_system_without_direct_io_is_named() {
    let text = refusal(|o| (o.path, o.direct, o.readonly) = (Some("/proc/cpuinfo".into()), true, true));
    assert!(text.contains("opening with direct=on") && text.contains("has no O_DIRECT, use direct=off"), "{text}");
}

#[test]
fn pitfall_30_contents_never_choose_the_format() {
    // A guest writes itself the header of a format whose backing file is one of the host's.
    let mut rig = Rig::new(64, |_| {});
    let header =
        [&b"QFI\xfb\0\0\0\x03"[..], &64u64.to_be_bytes(), &11u32.to_be_bytes(), &[0; 44], b"/etc/passwd"].concat();
    rig.fill(0, 512);
    rig.mem.write_slice(&header, GuestAddress(DATA)).unwrap();
    assert_eq!(rig.request(T_OUT, 0, 512), (OK, 1));
    rig.device.reset();
    let options = BlockOptions { path: Some(rig.image.path().to_owned()), ..BlockOptions::default() };
    // The lock goes with the first device.
    let null = BlockOptions { storage: StorageKind::Null, size: Some(512), ..BlockOptions::default() };
    rig.device = BlockDevice::open("gone", &null, &pool(1)).unwrap();
    rig.device = BlockDevice::open("again", &options, &pool(1)).unwrap();
    rig.start(u64::MAX);
    rig.fill(0, 512);
    assert_eq!(rig.request(T_IN, 0, 512), (OK, 513));
    assert_eq!(rig.data(header.len()), header, "its own bytes, and nothing else's");
    let mut sectors = [0; 8];
    rig.device.read_config(0, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), 64);
}

#[test]
fn pitfall_33_a_second_writer_is_refused_by_name() {
    let image = image(8);
    let options = BlockOptions { path: Some(image.path().to_owned()), ..BlockOptions::default() };
    let readonly = BlockOptions { readonly: true, ..options.clone() };
    let pool = pool(1);
    let open = |options: &BlockOptions| BlockDevice::open("disk0", options, &pool);
    let first = open(&options).unwrap();
    for second in [&options, &readonly] {
        let error = open(second).map(drop).unwrap_err();
        assert!(matches!(error, OpenError::Host { .. }));
        let text = error.to_string();
        assert!(text.contains(&*image.path().to_string_lossy()) && text.contains("another process uses it"), "{text}");
    }
    drop(first);
    let _one = open(&readonly).unwrap();
    let _two = open(&readonly).unwrap();
    open(&options).map(drop).unwrap_err();
}

#[derive(Clone, Debug)]
enum Action {
    Read,
    Write(u8),
    Zero(u32),
    Discard,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Batches over two queues, any segmentation, direct and indirect, page-cached and O_DIRECT, against a model.
    #[test]
    fn random_requests_do_what_the_model_does(
        direct in any::<bool>(),
        batches in prop::collection::vec(prop::collection::vec(
            (
                prop_oneof![
                    Just(Action::Read),
                    any::<u8>().prop_map(Action::Write),
                    (0u32..2).prop_map(Action::Zero),
                    Just(Action::Discard),
                ],
                1usize..16,
                prop::collection::vec(1usize..2000, 0..6),
                any::<bool>(),
                0u64..3,
            ),
            1..8,
        ), 1..12),
    ) {
        const SECTORS: usize = 256;
        let mut rig = Rig::new(SECTORS, |options| (options.direct, options.queues) = (direct, 2));
        let mut model = vec![0u8; SECTORS * SECTOR];
        for batch in batches {
            let mut reads = Vec::new();
            let count = batch.len();
            // Each request of a batch has sectors of its own, so that their order does not matter.
            for (slot, (action, sectors, cuts, indirect, shift)) in batch.into_iter().enumerate() {
                let sector = slot * 32 + sectors;
                let range = sector * SECTOR..(sector + sectors) * SECTOR;
                let at = HEADERS + slot as u64 * 64;
                let data = DATA + slot as u64 * 0x1_0000 + shift;
                let (kind, writable) = match action {
                    Action::Read => {
                        reads.push((data, range.clone()));
                        (T_IN, true)
                    }
                    Action::Write(fill) => {
                        let bytes: Vec<u8> = range.clone().map(|i| fill.wrapping_add((i / 3) as u8)).collect();
                        rig.mem.write_slice(&bytes, GuestAddress(data)).unwrap();
                        model[range.clone()].copy_from_slice(&bytes);
                        (T_OUT, false)
                    }
                    Action::Zero(_) | Action::Discard => {
                        let flags = if let Action::Zero(flags) = action { flags } else { 0 };
                        let segment = [
                            &(sector as u64).to_le_bytes()[..],
                            &(sectors as u32).to_le_bytes(),
                            &flags.to_le_bytes(),
                        ].concat();
                        rig.mem.write_slice(&segment, GuestAddress(data)).unwrap();
                        model[range.clone()].fill(0);
                        (if let Action::Zero(_) = action { T_WRITE_ZEROES } else { T_DISCARD }, false)
                    }
                };
                let len = if matches!(kind, T_IN | T_OUT) { range.len() } else { 16 };
                rig.write_header(at, kind, sector as u64);
                let mut chain = vec![
                    Buffer { addr: at, len: 5, writable: false },
                    Buffer { addr: at + 5, len: 11, writable: false },
                ];
                let mut from = 0;
                for cut in cuts.into_iter().chain([len]) {
                    let cut = cut.min(len - from);
                    chain.push(Buffer { addr: data + from as u64, len: cut as u32, writable });
                    from += cut;
                }
                chain.push(Buffer { addr: at + 16, len: 1, writable: true });
                let driver = &mut rig.queues[slot % 2].driver;
                if indirect {
                    driver.add_indirect(0x7_0000 + slot as u64 * 0x400, &chain).unwrap();
                } else {
                    driver.add(&chain).unwrap();
                }
            }
            for queue in 0..2 {
                rig.kick(queue);
                while rig.queues[queue].driver.in_flight() > 0 {
                    rig.next_used(queue);
                }
            }
            for slot in 0..count {
                prop_assert_eq!(rig.status(HEADERS + slot as u64 * 64), OK);
            }
            for (addr, range) in reads {
                let mut bytes = vec![0; range.len()];
                rig.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
                prop_assert!(bytes == model[range]);
            }
        }
        rig.device.reset();
        prop_assert!(rig.contents() == model);
    }
}
