//! Numbered frames, each of which has to arrive once and whole. `job=net-echo` sends them over a port that is looped;
//! `job=net-peer` exchanges them with another such guest, once each side knows that the other hears it. Nothing is sent
//! twice: a port that loses a frame without saying so fails the job. With `until=told` an echo goes on until it is enough, and
//! frames that are lost or come twice are counted instead.

use alloc::vec::Vec;

use crate::drivers::doze::{Doze, Tally as Sleep};
use crate::drivers::net::{LONGEST, Nic, Pair};
use crate::job::Options;
use crate::machine::mem::Region;
use crate::machine::sync::Lock;
use crate::machine::{clock, fail, smp};
use crate::say;
use crate::shared::rng::{Rng, mix};

const DEFAULT_FRAMES: u64 = 100_000;
/// The bitmap of frames seen has a bit for each.
const MOST_FRAMES: u64 = 1 << 28;
/// Where there is no end to them, for each of the last: far more than can be on their way.
const LAST_FRAMES: u64 = 1 << 20;
const SHORTEST: usize = 60;
const USUAL: usize = 1_514;
/// Short of the longest by far enough that every port takes it.
const JUMBO: usize = 65_000;
/// One in so many frames is longer than usual, with `jumbo=1`.
const JUMBO_EVERY: u64 = 8;
/// IEEE 802 local experimental ethertype 1.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const EVERYBODY: [u8; 6] = [0xff; 6];
/// Where the words of a frame begin: behind addresses, type and two bytes that make it a multiple of 8.
const WORDS: usize = 16;
/// Words that say what a frame is; the pattern follows.
const FIXED_WORDS: usize = 3;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// How often a hello is sent, and how long is listened for frames too many.
const HELLO_EVERY_MS: u64 = 1;
const LINGER_MS: u64 = 10;
const ASK_EVERY_MS: u64 = 2;
/// Frames that are taken before others are sent again.
const BURST: usize = 64;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// One of those that are counted.
    Data,
    /// "Is there somebody?"
    Hello,
    /// "I hear you."
    Heard,
}

/// What a sound frame says.
struct Said {
    purpose: Purpose,
    stream: u16,
    number: u64,
}

/// Sends and receives over a port that gives back what it gets.
pub fn echo(options: &Options) {
    run(options, |pair| (pair, pair), true);
}

/// Sends to another guest and receives as many frames of it.
pub fn peer(options: &Options) {
    let (own, other) = match options.word.as_str() {
        "a" => (0x100, 0x200),
        "b" => (0x200, 0x100),
        word => fail(format_args!("command-line where=role expected=a-or-b got={word:?}")),
    };
    run(options, |pair| (own | pair, other | pair), false);
}

/// `streams` tells what a pair's frames are marked with: those it sends, and those it is to receive.
fn run(options: &Options, streams: impl Fn(u16) -> (u16, u16) + Sync, met: bool) {
    let frames = options.ops.unwrap_or(DEFAULT_FRAMES);
    if frames > MOST_FRAMES {
        fail(format_args!("command-line where=frames expected=at-most-{MOST_FRAMES} got={frames}"));
    }
    if let Some(size) = options.size
        && !(SHORTEST as u64..=JUMBO as u64).contains(&size)
    {
        fail(format_args!("command-line where=size expected={SHORTEST}..={JUMBO} got={size}"));
    }
    let nic = Nic::open(options, LONGEST);
    let count = nic.pairs.len() as u64;
    let cpus = options.cpus.min(nic.pairs.len());
    let sleep = Lock::new(Sleep::default());
    let tallies: Vec<Lock<Vec<Tally>>> = (0..cpus).map(|_| Lock::new(Vec::new())).collect();
    say!("start job={}", options.name);
    smp::run(cpus, &|cpu| {
        let mut held: Vec<_> = nic.pairs.iter().skip(cpu).step_by(cpus).map(Lock::lock).collect();
        let mut lanes: Vec<Lane<'_>> = held
            .iter_mut()
            .map(|pair| {
                let index = u64::from(pair.index);
                let share = frames / count + u64::from(index < frames % count);
                let (own, other) = streams(pair.index);
                Lane::new(pair, options, share, own, other, nic.mac, met)
            })
            .collect();
        // What one side sends may wait for what it is to see first: each interrupt is for the next frame.
        let mut doze = Doze::new(nic.irq(cpu), false);
        drive(&mut lanes, options, &mut doze);
        sleep.lock().add(doze.tally());
        *tallies[cpu].lock() = lanes.into_iter().map(Lane::into_tally).collect();
    });
    nic.transport.reset();
    let sleep = *sleep.lock();
    report(options, &nic, cpus, sleep, tallies.iter().flat_map(|all| core::mem::take(&mut *all.lock())));
}

fn drive(lanes: &mut [Lane<'_>], options: &Options, doze: &mut Doze) {
    let limit = clock::from_ms(options.stall_ms);
    let mut last = clock::ticks();
    // Each look whether it is enough is an exit.
    let (mut goes_on, mut asked) = (options.until_told, last);
    loop {
        let now = clock::ticks();
        if goes_on && now.wrapping_sub(asked) > clock::from_ms(ASK_EVERY_MS) {
            asked = now;
            goes_on = options.goes_on();
            if !goes_on {
                lanes.iter_mut().for_each(|lane| lane.end(now));
            }
        }
        let mut moved = false;
        for lane in lanes.iter_mut() {
            moved |= lane.turn(now);
        }
        if moved {
            last = now;
        } else if lanes.iter().all(Lane::is_done) {
            // Nothing more may come: what does is a frame too many, and told by whoever takes it.
            if now.wrapping_sub(last) > clock::from_ms(LINGER_MS) {
                return;
            }
        } else if now.wrapping_sub(last) > limit {
            // Of an echo that was told to end, what has not come for so long is lost.
            if lanes.iter().all(|lane| lane.endless && lane.is_over() && lane.pair.tx.is_idle()) {
                return;
            }
            lanes.iter().for_each(Lane::complain);
        }
        doze.turn(now, u64::from(moved), lanes.iter_mut().flat_map(|lane| lane.pair.queues()));
    }
}

/// What a pair has counted.
#[derive(Default)]
struct Tally {
    frames: u64,
    bytes: u64,
    lost: u64,
    twice: u64,
    reordered: u64,
    hellos: u64,
    ticks: u64,
    kicks: u64,
}

/// One pair at work.
struct Lane<'a> {
    pair: &'a mut Pair,
    rng: Rng,
    size: Option<usize>,
    jumbo: bool,
    mac: [u8; 6],
    own: u16,
    other: u16,
    frames: u64,
    /// There is no end to them until the guest is told.
    endless: bool,
    sent: u64,
    /// A bit for each frame that came, or for each of the last.
    seen: Vec<u64>,
    /// One more than the highest number that came.
    next: u64,
    /// Frames of the other side have come.
    hears: bool,
    /// The other side has said that ours have.
    heard: bool,
    /// It was told that it is heard too, after which nothing is lost.
    told: bool,
    hello_at: u64,
    begun: u64,
    scratch: Vec<u8>,
    tally: Tally,
}

impl<'a> Lane<'a> {
    fn new(pair: &'a mut Pair, options: &Options, frames: u64, own: u16, other: u16, mac: [u8; 6], met: bool) -> Self {
        let now = clock::ticks();
        Self {
            pair,
            rng: Rng::new(options.seed.wrapping_add(u64::from(own))),
            size: options.size.map(|size| size as usize),
            jumbo: options.jumbo,
            mac,
            own,
            other,
            frames: if options.until_told { u64::MAX } else { frames },
            endless: options.until_told,
            sent: 0,
            seen: alloc::vec![0; if options.until_told { LAST_FRAMES } else { frames }.div_ceil(64) as usize],
            next: 0,
            hears: met,
            heard: met,
            told: met,
            hello_at: now,
            begun: now,
            scratch: alloc::vec![0; LONGEST],
            tally: Tally::default(),
        }
    }

    fn is_done(&self) -> bool {
        self.is_over() && self.tally.frames == self.sent && self.pair.tx.is_idle()
    }

    /// Whether all was sent that is to be sent.
    fn is_over(&self) -> bool {
        self.sent == self.frames
    }

    /// Ends a run without an end, here.
    fn end(&mut self, now: u64) {
        self.frames = self.sent;
        self.tally.ticks = now.wrapping_sub(self.begun);
        self.tally.kicks = self.pair.kicks();
    }

    /// What has not come by the end is lost.
    fn into_tally(self) -> Tally {
        let lost = if self.endless { self.sent.saturating_sub(self.tally.frames) } else { 0 };
        Tally { lost, ..self.tally }
    }

    /// The bit of a frame that is about to be sent was that of one long before.
    fn forget_old(&mut self) {
        if self.endless {
            let (word, bit) = bit_of(self.sent % LAST_FRAMES);
            self.seen[word] &= !bit;
        }
    }

    /// Takes what came and sends what fits. Returns whether any data moved: hellos alone are no progress.
    fn turn(&mut self, now: u64) -> bool {
        let (sent, received) = (self.sent, self.tally.frames);
        self.pair.tx.reap();
        self.receive(now);
        if self.heard && self.told {
            while self.sent < self.frames
                && let Some(slot) = self.pair.tx.take()
            {
                let size = self.next_size();
                self.forget_old();
                self.send(slot, Purpose::Data, self.sent, size);
                self.sent += 1;
            }
        } else if self.heard || now.wrapping_sub(self.hello_at) > clock::from_ms(HELLO_EVERY_MS) {
            self.hello_at = now;
            self.greet();
        }
        self.pair.tx.publish();
        (sent, received) != (self.sent, self.tally.frames)
    }

    fn greet(&mut self) {
        if let Some(slot) = self.pair.tx.take() {
            let purpose = if self.hears { Purpose::Heard } else { Purpose::Hello };
            self.send(slot, purpose, 0, SHORTEST);
            self.tally.hellos += 1;
            self.told = self.heard;
        }
    }

    fn next_size(&mut self) -> usize {
        if let Some(size) = self.size {
            return size;
        }
        let (from, to) =
            if self.jumbo && self.rng.below(JUMBO_EVERY) == 0 { (USUAL + 1, JUMBO) } else { (SHORTEST, USUAL) };
        from + self.rng.below((to - from + 1) as u64) as usize
    }

    fn send(&mut self, slot: u16, purpose: Purpose, number: u64, size: usize) {
        let frame = self.pair.tx.frame(slot);
        frame.copy_in(0, &EVERYBODY);
        frame.copy_in(6, &self.mac);
        frame.copy_in(12, &ETHERTYPE);
        frame.write::<u16>(14, 0);
        write_words(frame, purpose, self.own, number, size);
        self.pair.tx.send(slot, size);
    }

    fn receive(&mut self, now: u64) {
        for _ in 0..BURST {
            let mut len = 0;
            let scratch = &mut self.scratch;
            let taken = self.pair.rx.next(|part| {
                let end = len + part.len();
                if end <= LONGEST {
                    part.copy_out(0, &mut scratch[len..end]);
                }
                len = end;
            });
            let Some(len) = taken else { break };
            if len > LONGEST {
                self.spoilt(format_args!("len:{len}"));
            }
            if self.scratch[12..14] != ETHERTYPE {
                // The host's own, such as router solicitations of a tap.
                continue;
            }
            match read_words(&self.scratch[..len]) {
                Ok(said) => self.take(&said, len, now),
                Err(what) => self.spoilt(format_args!("{what},len:{len}")),
            }
        }
        self.pair.rx.publish();
    }

    fn take(&mut self, said: &Said, len: usize, now: u64) {
        if said.stream != self.other {
            // What is for a pair that this side does not serve yet may come to the first, while the other calls already.
            if said.purpose != Purpose::Data {
                return;
            }
            self.spoilt(format_args!("stream:{:#x}", said.stream));
        }
        match said.purpose {
            Purpose::Data => {
                // Whoever sends these was told.
                self.meet(now);
                self.told = true;
                self.count(said.number, len, now);
            }
            Purpose::Hello => self.hears = true,
            Purpose::Heard => self.meet(now),
        }
    }

    /// The other side is heard, and hears: the time of the exchange begins.
    fn meet(&mut self, now: u64) {
        if !self.heard {
            (self.hears, self.heard) = (true, true);
            self.begun = now;
        }
    }

    fn count(&mut self, number: u64, len: usize, now: u64) {
        if number >= self.frames
            || self.endless && !(self.sent.saturating_sub(LAST_FRAMES)..self.sent).contains(&number)
        {
            self.spoilt(format_args!("number:{number}"));
        }
        let (word, bit) = bit_of(if self.endless { number % LAST_FRAMES } else { number });
        if self.seen[word] & bit != 0 {
            if self.endless {
                self.tally.twice += 1;
                return;
            }
            self.spoilt(format_args!("number:{number}-twice"));
        }
        self.seen[word] |= bit;
        if number < self.next {
            self.tally.reordered += 1;
        } else {
            self.next = number + 1;
        }
        self.tally.frames += 1;
        self.tally.bytes += len as u64;
        if self.tally.frames == self.frames && !self.endless {
            self.tally.ticks = now.wrapping_sub(self.begun);
            self.tally.kicks = self.pair.kicks();
        }
    }

    #[cold]
    fn spoilt(&self, got: core::fmt::Arguments<'_>) -> ! {
        fail(format_args!(
            "corrupted where=pair:{},frame:{} expected=a-frame-as-sent got={got}",
            self.pair.index, self.tally.frames
        ))
    }

    /// Ends the run if this is a lane that stands still.
    fn complain(&self) {
        let lost = self.sent - self.tally.frames.min(self.sent);
        if !self.heard {
            fail(format_args!(
                "peer where=pair:{} expected=somebody got=nobody hears={} hellos={}",
                self.pair.index, self.hears, self.tally.hellos
            ));
        }
        if !self.is_done() {
            let missing = (0..self.frames).find(|&number| self.seen[(number / 64) as usize] >> (number % 64) & 1 == 0);
            fail(format_args!(
                "stall where=pair:{} expected=frames:{} got=sent:{},received:{},unanswered:{lost},first-missing:{missing:?},idle:{}",
                self.pair.index,
                self.frames,
                self.sent,
                self.tally.frames,
                self.pair.tx.is_idle()
            ));
        }
    }
}

/// Where the bit of a number is.
fn bit_of(number: u64) -> (usize, u64) {
    ((number / 64) as usize, 1 << (number % 64))
}

fn seed(stream: u16, number: u64) -> u64 {
    mix(number ^ mix(u64::from(stream)))
}

/// Writes a frame's words: number; purpose, stream and length; a hash; a pattern that follows from it.
fn write_words(frame: Region, purpose: Purpose, stream: u16, number: u64, size: usize) {
    let seed = seed(stream, number);
    frame.write(WORDS, number);
    frame.write(WORDS + 8, (purpose as u64) << 48 | u64::from(stream) << 32 | size as u64);
    frame.write(WORDS + 16, seed);
    // The last word may reach beyond the frame's end, into room that its slot has.
    for index in FIXED_WORDS..(size - WORDS).div_ceil(8) {
        frame.write(WORDS + index * 8, pattern(seed, index));
    }
}

#[inline(always)]
fn pattern(seed: u64, index: usize) -> u64 {
    seed.wrapping_add((index as u64).wrapping_mul(STEP))
}

/// Checks all of a frame. What is wrong with it otherwise.
fn read_words(frame: &[u8]) -> Result<Said, &'static str> {
    let words = frame.get(WORDS..).filter(|_| frame.len() >= SHORTEST).ok_or("too-short")?;
    let mut whole = words.chunks_exact(8);
    let mut next = || whole.next().map_or(0, word);
    let (number, what, hash) = (next(), next(), next());
    let purpose = match what >> 48 {
        0 => Purpose::Data,
        1 => Purpose::Hello,
        2 => Purpose::Heard,
        _ => return Err("purpose"),
    };
    let stream = (what >> 32) as u16;
    if what & 0xffff_ffff != frame.len() as u64 {
        return Err("another-length");
    }
    let seed = seed(stream, number);
    if hash != seed {
        return Err("hash");
    }
    let mut index = FIXED_WORDS;
    let mut differences = 0;
    for chunk in &mut whole {
        differences |= word(chunk) ^ pattern(seed, index);
        index += 1;
    }
    let rest = whole.remainder();
    let sound = differences == 0 && *rest == pattern(seed, index).to_le_bytes()[..rest.len()];
    if sound { Ok(Said { purpose, stream, number }) } else { Err("pattern") }
}

#[inline(always)]
fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// Reached only when every frame has come, unless lost ones are counted: what is lost or spoilt has ended the run before.
fn report(options: &Options, nic: &Nic, cpus: usize, sleep: Sleep, tallies: impl Iterator<Item = Tally>) {
    let mut all = Tally::default();
    for tally in tallies {
        all.frames += tally.frames;
        all.bytes += tally.bytes;
        all.lost += tally.lost;
        all.twice += tally.twice;
        all.reordered += tally.reordered;
        all.hellos += tally.hellos;
        all.ticks = all.ticks.max(tally.ticks);
        all.kicks += tally.kicks;
    }
    let ns = clock::to_ns(all.ticks).max(1);
    let per_second = |number: u64| (u128::from(number) * 1_000_000_000 / u128::from(ns)) as u64;
    say!(
        "result job={} pairs={} cpus={cpus} features={:#x} time_ns={ns} frames={} bytes={} lost={} twice={} reordered={} corrupted=0 \
         hellos={} fps={} bps={} kicks={} {sleep}",
        options.name,
        nic.pairs.len(),
        nic.features,
        all.frames,
        all.bytes,
        all.lost,
        all.twice,
        all.reordered,
        all.hellos,
        per_second(all.frames),
        per_second(all.bytes * 8),
        all.kicks
    );
}
