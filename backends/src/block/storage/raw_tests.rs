//! Raw storage against a model, page-cached and under every alignment that O_DIRECT may ask for.

use std::os::unix::fs::OpenOptionsExt;

use proptest::prelude::*;

use super::*;
use crate::block::storage::share::MEMORY;
use crate::io::ring::{Ring, Token};
use crate::virtqueue::buffers::{MAX_BYTES, MAX_PIECES};

const SIZE: usize = 64 << 10;

/// Storage over a fresh image with pattern in it, and a ring to run it on.
struct Rig {
    raw: Raw,
    ring: Ring,
    model: Vec<u8>,
    /// Most bytes of bounce memory that were seen in use.
    most_taken: u64,
    /// Requests in the order of their ends.
    order: Vec<usize>,
    _image: tempfile::NamedTempFile,
}

/// The storage's knowledge of its file.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Cached,
    /// O_DIRECT in sectors.
    Direct512,
    /// O_DIRECT on a device of 4 KiB blocks.
    Direct4k,
}

const MODES: [Mode; 3] = [Mode::Cached, Mode::Direct512, Mode::Direct4k];

fn rig(mode: Mode) -> Rig {
    // Next to the build's own files, which are on a file system with O_DIRECT; the usual directory may be a tmpfs.
    let image = tempfile::NamedTempFile::new_in(crate::scratch_dir()).unwrap();
    let model: Vec<u8> = (0..SIZE).map(|i| (i / 512 * 7 + i % 251) as u8).collect();
    std::fs::write(image.path(), &model).unwrap();
    let align = match mode {
        Mode::Cached => None,
        Mode::Direct512 => Some(DirectAlign { memory: 512, offset: 512 }),
        Mode::Direct4k => Some(DirectAlign { memory: 4096, offset: 4096 }),
    };
    let flags = if align.is_some() { libc::O_DIRECT } else { 0 };
    let file = File::options().read(true).write(true).custom_flags(flags).open(image.path()).unwrap();
    let geometry =
        Geometry { capacity: SIZE as u64, logical_block: 512, physical_block: 4096, readonly: false, discard: true };
    let mut raw = Raw::new(Arc::new(file), geometry, align);
    raw.attached(Waker::noop());
    Rig { raw, ring: Ring::new().unwrap(), model, most_taken: 0, order: Vec::new(), _image: image }
}

/// Pieces over a buffer of the test's, cut at the given places.
fn pieces(buf: &mut [u8], cuts: &[usize]) -> GuestIo {
    let mut io = GuestIo::default();
    let mut rest = buf;
    for cut in cuts {
        let (head, tail) = rest.split_at_mut(*cut.min(&rest.len()));
        // SAFETY: the buffer outlives the list in every test below.
        unsafe { io.push(head.as_mut_ptr(), head.len()) };
        rest = tail;
    }
    // SAFETY: as above.
    unsafe { io.push(rest.as_mut_ptr(), rest.len()) };
    io
}

impl Rig {
    /// Runs operations started by `start` to their ends, all at once.
    fn run_all(
        &mut self,
        data: &mut [GuestIo],
        mut start: impl FnMut(&mut Raw, usize, &mut RawOp, &mut GuestIo, &mut Io<'_>) -> Progress,
        mut tamper: impl FnMut(i32) -> i32,
    ) -> Vec<io::Result<()>> {
        let mut ops: Vec<RawOp> = data.iter().map(|_| RawOp::default()).collect();
        let mut results: Vec<Option<io::Result<()>>> = data.iter().map(|_| None).collect();
        for (slot, data) in data.iter_mut().enumerate() {
            let mut io = Io::new(&mut self.ring, Token { task: 0, slot: slot as u32 });
            if let Progress::Done(result) = start(&mut self.raw, slot, &mut ops[slot], data, &mut io) {
                results[slot] = Some(result);
            }
        }
        let mut batch = Vec::new();
        while results.iter().any(Option::is_none) {
            self.most_taken = self.most_taken.max(self.raw.part.taken());
            self.ring.submit().unwrap();
            if let Some(slot) = self.raw.next_woken() {
                batch = vec![(Token { task: 0, slot }, 0)];
            } else if self.ring.has_completions() {
                self.ring.reap(&mut batch);
                batch.iter_mut().for_each(|(_, result)| *result = tamper(*result));
            }
            for (token, result) in batch.drain(..) {
                let slot = token.slot as usize;
                let mut io = Io::new(&mut self.ring, token);
                if let Progress::Done(result) = self.raw.resume(&mut ops[slot], &mut data[slot], result, &mut io) {
                    results[slot] = Some(result);
                    self.order.push(slot);
                }
            }
        }
        assert_eq!(self.raw.part.taken(), 0, "memory was not given back");
        results.into_iter().map(Option::unwrap).collect()
    }

    fn run(
        &mut self,
        data: GuestIo,
        mut start: impl FnMut(&mut Raw, &mut RawOp, &mut GuestIo, &mut Io<'_>) -> Progress,
    ) -> io::Result<()> {
        let start =
            |raw: &mut Raw, _: usize, op: &mut RawOp, data: &mut GuestIo, io: &mut Io<'_>| start(raw, op, data, io);
        self.run_all(&mut [data], start, |result| result).remove(0)
    }

    fn read_all(&mut self) -> Vec<u8> {
        let mut all = vec![0; SIZE];
        let data = pieces(&mut all, &[]);
        self.run(data, |raw, op, data, io| raw.read(op, 0, data, io)).unwrap();
        all
    }
}

#[derive(Clone, Debug)]
enum Action {
    Read,
    Write(u8),
    Zero { unmap: bool },
    Discard,
    Flush,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => Just(Action::Read),
        3 => any::<u8>().prop_map(Action::Write),
        1 => any::<bool>().prop_map(|unmap| Action::Zero { unmap }),
        1 => Just(Action::Discard),
        1 => Just(Action::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_mode_does_what_the_model_does(
        mode in prop::sample::select(&MODES),
        durable in any::<bool>(),
        actions in prop::collection::vec(
            (action(), 0usize..SIZE / 512, 1usize..24, prop::collection::vec(1usize..3000, 0..5), 0usize..3),
            1..24,
        ),
    ) {
        let mut rig = rig(mode);
        for (action, sector, count, cuts, misalign) in actions {
            let (offset, len) = (sector * 512, (count * 512).min(SIZE - sector * 512));
            let range = offset..offset + len;
            let mut memory = vec![0u8; len + 4096 + misalign];
            let start = memory.as_ptr().align_offset(4096) + misalign;
            let buf = &mut memory[start..start + len];
            let at = offset as u64;
            match action {
                Action::Read => {
                    let data = pieces(buf, &cuts);
                    rig.run(data, |raw, op, data, io| raw.read(op, at, data, io)).unwrap();
                    prop_assert!(buf == &rig.model[range], "read of {len} at {offset}");
                }
                Action::Write(fill) => {
                    buf.iter_mut().enumerate().for_each(|(i, b)| *b = fill.wrapping_add(i as u8));
                    rig.model[range].copy_from_slice(buf);
                    let data = pieces(buf, &cuts);
                    rig.run(data, |raw, op, data, io| raw.write(op, at, data, durable, io)).unwrap();
                }
                Action::Zero { unmap } => {
                    rig.model[range].fill(0);
                    rig.run(GuestIo::default(), |raw, op, _, io| {
                        raw.write_zeroes(op, at, len as u64, unmap, durable, io)
                    }).unwrap();
                }
                Action::Discard => {
                    // A file's discarded range reads as zeroes: here the hint is always taken.
                    rig.model[range].fill(0);
                    rig.run(GuestIo::default(), |raw, op, _, io| raw.discard(op, at, len as u64, durable, io)).unwrap();
                }
                Action::Flush => rig.run(GuestIo::default(), |raw, op, _, io| raw.flush(op, io)).unwrap(),
            }
        }
        let all = rig.read_all();
        prop_assert!(all == rig.model);
    }
}

#[test]
fn pitfall_19_the_storage_checks_its_end_again() {
    let mut rig = rig(Mode::Cached);
    let mut buf = [0; 1024];
    let end = SIZE as u64;
    for offset in [end - 512, end, u64::MAX - 511] {
        let data = pieces(&mut buf, &[]);
        let read = rig.run(data, |raw, op, data, io| raw.read(op, offset, data, io));
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let zero = rig.run(GuestIo::default(), |raw, op, _, io| raw.write_zeroes(op, offset, 1024, true, false, io));
        assert!(zero.is_err());
    }
}

#[test]
fn pitfall_26_short_transfers_go_on_where_they_ended() {
    for mode in MODES {
        let mut rig = rig(mode);
        for write in [false, true] {
            let mut memory = vec![0u8; 8192 + 4096];
            let start = memory.as_ptr().align_offset(4096);
            let buf = &mut memory[start..start + 8192];
            if write {
                buf.fill(0x5a);
                rig.model[4096..4096 + 8192].fill(0x5a);
            }
            let data = pieces(buf, &[100]);
            // The kernel did more than it reported; the storage must ask for the rest at the right place.
            let mut first = true;
            let shorten = |result: i32| if std::mem::take(&mut first) { result.min(4096) } else { result };
            let done = rig.run_all(
                &mut [data],
                |raw, _, op, data, io| {
                    if write { raw.write(op, 4096, data, false, io) } else { raw.read(op, 4096, data, io) }
                },
                shorten,
            );
            done[0].as_ref().unwrap();
            assert!(buf == &rig.model[4096..4096 + 8192], "{mode:?}, write {write}");
        }
        assert!(rig.read_all() == rig.model);
    }
}

#[test]
fn pitfall_26_a_transfer_of_nothing_is_an_error() {
    for mode in MODES {
        let mut rig = rig(mode);
        rig._image.as_file().set_len(4096).unwrap();
        let mut buf = vec![0; 8192];
        let data = pieces(&mut buf, &[]);
        let read = rig.run(data, |raw, op, data, io| raw.read(op, 8192, data, io));
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{mode:?}");
    }
}

#[test]
fn more_pieces_than_one_vector_takes() {
    let mut rig = rig(Mode::Cached);
    let mut buf = vec![0; 8192];
    let data = pieces(&mut buf, &[3; 2000]);
    assert!(data.pieces().len() > MAX_PIECES);
    rig.run(data, |raw, op, data, io| raw.read(op, 512, data, io)).unwrap();
    assert!(buf == rig.model[512..512 + 8192]);
}

#[test]
fn pitfall_22_writes_that_share_a_block_do_not_undo_each_other() {
    let mut rig = rig(Mode::Direct4k);
    // Eight sectors of one block, each written on its own, all at once.
    let mut bufs: Vec<[u8; 512]> = (0..8).map(|i| [i as u8 + 1; 512]).collect();
    let mut data: Vec<GuestIo> = bufs.iter_mut().map(|buf| pieces(buf, &[])).collect();
    let done = rig.run_all(
        &mut data,
        |raw, slot, op, data, io| raw.write(op, 4096 + slot as u64 * 512, data, false, io),
        |result| result,
    );
    assert!(done.iter().all(Result::is_ok));
    for i in 0..8 {
        rig.model[4096 + i * 512..][..512].fill(i as u8 + 1);
    }
    assert!(rig.read_all() == rig.model);
}

#[test]
fn writes_that_wait_for_a_block_go_on_in_their_order() {
    const COUNT: usize = 64;
    let mut rig = rig(Mode::Direct4k);
    let mut bufs: Vec<[u8; 512]> = (0..COUNT).map(|i| [i as u8 + 1; 512]).collect();
    let mut data: Vec<GuestIo> = bufs.iter_mut().map(|buf| pieces(buf, &[])).collect();
    let mut operations = 0;
    let done = rig.run_all(
        &mut data,
        |raw, slot, op, data, io| raw.write(op, 8192 + slot as u64 % 8 * 512, data, false, io),
        |result| {
            operations += 1;
            result
        },
    );
    assert!(done.iter().all(Result::is_ok));
    assert_eq!(rig.order, (0..COUNT).collect::<Vec<_>>());
    assert_eq!(operations, 2 * COUNT, "a read and a write each, and nobody looks again and again");
    for slot in 0..COUNT {
        rig.model[8192 + slot % 8 * 512..][..512].fill(slot as u8 + 1);
    }
    assert!(rig.read_all() == rig.model);
}

#[test]
fn bounce_buffers_of_a_disk_are_bounded() {
    const COUNT: usize = 400;
    for write in [false, true] {
        let mut rig = rig(Mode::Direct512);
        // All read or write the same, through buffers that begin at odd addresses.
        let mut bufs = vec![vec![0; SIZE + 513]; COUNT];
        let model = rig.model.clone();
        let skip = |buf: &[u8]| buf.as_ptr().align_offset(512) + 1;
        bufs.iter_mut().for_each(|buf| {
            let at = skip(buf);
            buf[at..][..SIZE].copy_from_slice(if write { &model } else { &[0; SIZE] });
        });
        let mut data: Vec<GuestIo> = bufs
            .iter_mut()
            .map(|buf| {
                let at = skip(buf);
                pieces(&mut buf[at..][..SIZE], &[])
            })
            .collect();
        let done = rig.run_all(
            &mut data,
            |raw, _, op, data, io| if write { raw.write(op, 0, data, false, io) } else { raw.read(op, 0, data, io) },
            |result| result,
        );
        assert!(done.iter().all(Result::is_ok));
        assert!(rig.most_taken > MEMORY / 2 && rig.most_taken <= MEMORY, "{} bytes at once", rig.most_taken);
        assert!(bufs.iter().all(|buf| buf[skip(buf)..][..SIZE] == model) && rig.read_all() == model);
    }
}

#[test]
fn zeroes_that_are_written_need_no_memory_of_their_own() {
    let mut rig = rig(Mode::Cached);
    let mut data: Vec<GuestIo> = (0..16).map(|_| GuestIo::default()).collect();
    let mut written = 0;
    let done = rig.run_all(
        &mut data,
        |raw, _, op, _, io| raw.write_zeroes(op, 0, SIZE as u64, false, false, io),
        |result| {
            written += result.max(0) as usize;
            // Only a write brings more than 0.
            if result == 0 { -libc::EOPNOTSUPP } else { result }
        },
    );
    assert!(done.iter().all(Result::is_ok));
    assert!(written >= 16 * SIZE, "{written} bytes");
    assert_eq!(rig.most_taken, 0);
    assert!(rig.read_all() == [0; SIZE]);
}

#[test]
fn a_large_transfer_goes_in_steps() {
    let mut rig = rig(Mode::Cached);
    let len = 5 * MAX_BYTES as usize;
    rig.raw.geometry.capacity = len as u64;
    let mut written: Vec<u8> = (0..len).map(|i| (i / 512 + i % 249) as u8).collect();
    let mut read = vec![0; len];
    for (buf, write) in [(&mut written, true), (&mut read, false)] {
        // In pieces that are shorter than a step and one that is longer than two.
        let mut data = [pieces(buf, &[512, MAX_BYTES as usize - 512, 1 << 20, 5 << 20])];
        let mut steps = Vec::new();
        let done = rig.run_all(
            &mut data,
            |raw, _, op, data, io| if write { raw.write(op, 0, data, false, io) } else { raw.read(op, 0, data, io) },
            |result| {
                steps.push(result);
                result
            },
        );
        assert!(done[0].is_ok());
        assert!(steps.iter().all(|&step| 0 < step && step <= MAX_BYTES as i32), "{steps:?}");
        assert_eq!(steps.iter().map(|&step| step as usize).sum::<usize>(), len);
    }
    assert!(read == written);
}

#[test]
fn pitfall_23_zeroes_are_written_where_they_can_not_be_punched() {
    for (mode, result) in MODES.into_iter().flat_map(|mode| [(mode, -libc::EOPNOTSUPP), (mode, -libc::EINVAL)]) {
        for unmap in [false, true] {
            let mut rig = rig(mode);
            // Undo the kernel's work and report that it can't do it.
            let mut calls = 0;
            let before = rig.model.clone();
            let path = rig._image.path().to_owned();
            rig.model[512..512 + 9216].fill(0);
            let done = rig.run_all(
                &mut [GuestIo::default()],
                |raw, _, op, _, io| raw.write_zeroes(op, 512, 9216, unmap, true, io),
                |real| {
                    calls += 1;
                    if calls > 1 + i32::from(unmap) {
                        return real;
                    }
                    std::fs::write(&path, &before).unwrap();
                    result
                },
            );
            done[0].as_ref().unwrap();
            assert!(calls > 1 + i32::from(unmap), "zeroes were written");
            assert!(rig.read_all() == rig.model);
        }
    }
    let mut rig = rig(Mode::Cached);
    let done = rig.run_all(
        &mut [GuestIo::default()],
        |raw, _, op, _, io| raw.discard(op, 0, 4096, false, io),
        |_| -libc::EOPNOTSUPP,
    );
    assert!(done[0].is_ok(), "a discard is a hint");
}

#[test]
fn pitfall_21_the_storage_refuses_writes_when_read_only() {
    let mut rig = rig(Mode::Cached);
    rig.raw.geometry.readonly = true;
    let mut buf = [1; 512];
    let data = pieces(&mut buf, &[]);
    let write = rig.run(data, |raw, op, data, io| raw.write(op, 0, data, false, io));
    assert_eq!(write.unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert!(rig.run(GuestIo::default(), |raw, op, _, io| raw.discard(op, 0, 512, false, io)).is_err());
    assert!(rig.run(GuestIo::default(), |raw, op, _, io| raw.flush(op, io)).is_ok());
}
