package keyturn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

const (
	batchTimeout = 10 * time.Second
	batchRecords = 100
	// The sidecar refuses a record over 64 KiB by itself, and a batch over 1 MiB: with these a record that is too large
	// keeps no other from being sent.
	batchBytes  = 1 << 19
	recordBytes = 1 << 16
)

// An outbox is the queue of records in the background, and its one sender, a goroutine that lives while there is
// something to send.
type outbox struct {
	send         func(context.Context, []*keyturnv1.RecordRequest) ([]error, error)
	onUnsent     func(Unsent)
	retries      Retries
	capacity     int
	closeTimeout time.Duration
	stopping     context.Context // ends when Close gives up
	stop         context.CancelFunc

	mu       sync.Mutex
	queue    []*queued // oldest first; only the sender and close take out
	numbers  uint64    // of the newest
	expected int       // decisions on their way that may yet bring a record
	sending  bool      // there is a sender
	closed   bool      // takes no more from callers
	over     bool      // takes no more at all
	changed  chan struct{}
}

// queued is one record on its way.
type queued struct {
	number  uint64
	record  RecordRequest
	message *keyturnv1.RecordRequest
	bytes   int
	tries   int
	due     time.Time // not before; the zero time: at once
	err     error     // of the last try
}

func newOutbox(send func(context.Context, []*keyturnv1.RecordRequest) ([]error, error), onUnsent func(Unsent),
	retries Retries, capacity int, closeTimeout time.Duration,
) *outbox {
	if onUnsent == nil {
		onUnsent = func(unsent Unsent) {
			slog.Error("keyturn: a record was not sent", "outcome", unsent.Record.Outcome.String(), "error", unsent.Err)
		}
	}
	o := &outbox{
		send: send, onUnsent: onUnsent, retries: retries, capacity: capacity, closeTimeout: closeTimeout,
		changed: make(chan struct{}),
	}
	o.stopping, o.stop = context.WithCancel(context.Background())
	return o
}

// push queues a caller's record.
func (o *outbox) push(record RecordRequest) error {
	return o.enqueue(record, func() bool { return o.closed })
}

// pushOrReport queues a record that has no caller to go back to.
func (o *outbox) pushOrReport(record RecordRequest) {
	if err := o.push(record); err != nil {
		o.report(Unsent{Record: record, Err: err})
	}
}

// enqueue puts a record at the end of the queue, unless that takes no more.
func (o *outbox) enqueue(record RecordRequest, refused func() bool) error {
	message, err := encodeRecord(record)
	if err != nil {
		return err
	}
	size := proto.Size(message)
	if size > recordBytes {
		return invalid("the record has %d bytes; the limit is %d", size, recordBytes)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case refused():
		return ErrClosed
	case len(o.queue) >= o.capacity:
		return ErrQueueFull
	}
	o.numbers++
	o.queue = append(o.queue, &queued{number: o.numbers, record: record, message: message, bytes: size})
	o.announce()
	if !o.sending {
		o.sending = true
		go o.run()
	}
	return nil
}

// expect announces a record that may come of a decision on its way, so that close waits for it. What it returns is called
// once, with the record or nil.
func (o *outbox) expect() func(*RecordRequest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.expected++
	return func(record *RecordRequest) {
		if record != nil {
			if err := o.enqueue(*record, func() bool { return o.over }); err != nil {
				o.report(Unsent{Record: *record, Err: err})
			}
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		o.expected--
		o.announce()
	}
}

// announce wakes whoever waits for a change. The lock is held.
func (o *outbox) announce() {
	close(o.changed)
	o.changed = make(chan struct{})
}

// run sends what is queued until there is nothing left.
func (o *outbox) run() {
	failures := 0 // of whole batches, in a row
	for {
		batch, wait, changed := o.next()
		if changed == nil {
			return
		}
		if batch != nil {
			fault := o.deliver(batch)
			if fault == nil {
				failures = 0
				continue
			}
			// The sidecar is out of reach, or asks for a rest: that concerns every record, new ones too.
			failures++
			wait, changed = fault.RetryAfter+o.retries.jitter(failures), nil
		}
		if !o.sleep(wait, changed) {
			return
		}
	}
}

// next is what to send now, the oldest first; where nothing is due, how long to wait; and the channel that tells of a change
// meanwhile, which is nil when the queue is empty or given up, and the sender has to end.
func (o *outbox) next() ([]*queued, time.Duration, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.queue) == 0 || o.over {
		o.sending = false
		o.announce()
		return nil, 0, nil
	}
	var batch []*queued
	bytes, now, earliest := 0, time.Now(), time.Time{}
	for _, each := range o.queue {
		if each.due.After(now) {
			if earliest.IsZero() || each.due.Before(earliest) {
				earliest = each.due
			}
			continue
		}
		if bytes += each.bytes; bytes > batchBytes || len(batch) == batchRecords {
			break
		}
		batch = append(batch, each)
	}
	return batch, earliest.Sub(now), o.changed
}

// sleep waits, or for a change; false when the sender has to end.
func (o *outbox) sleep(wait time.Duration, changed <-chan struct{}) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-changed:
		return true
	case <-o.stopping.Done():
		o.mu.Lock()
		defer o.mu.Unlock()
		o.sending = false
		o.announce()
		return false
	}
}

// deliver sends a batch, and takes out what is sent or unsent. What is to be tried again stays where it was. The error is
// that of the whole batch when all of it is to be tried again.
func (o *outbox) deliver(batch []*queued) *Error {
	messages := make([]*keyturnv1.RecordRequest, len(batch))
	for i, each := range batch {
		messages[i] = each.message
	}
	failures, failure := o.send(o.stopping, messages)
	if o.stopping.Err() != nil && failure != nil {
		return &Error{} // close gives up, and takes what is left
	}
	if fault := passing(failure); fault != nil {
		for _, each := range batch {
			each.err = failure
		}
		return fault
	}
	done := make(map[uint64]bool, len(batch))
	for i, each := range batch {
		each.err = failure
		if failure == nil {
			each.err = failures[i]
		}
		if fault := passing(each.err); fault != nil {
			each.tries++
			each.due = time.Now().Add(fault.RetryAfter + o.retries.jitter(each.tries))
			continue
		}
		if each.err != nil {
			o.report(Unsent{Record: each.record, Err: each.err})
		}
		done[each.number] = true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.queue = slices.DeleteFunc(o.queue, func(each *queued) bool { return done[each.number] })
	o.announce()
	return nil
}

// passing is the fault of a record that is tried again, or nil.
func passing(failure error) *Error {
	if errors.Is(failure, ErrUnavailable) || errors.Is(failure, ErrResourceExhausted) {
		fault, _ := errors.AsType[*Error](failure)
		return fault
	}
	return nil
}

// report gives an unsent record to the callback. What that panics with ends here: the sender goes on.
func (o *outbox) report(unsent Unsent) {
	defer func() {
		if raised := recover(); raised != nil {
			slog.Error("keyturn: OnUnsent panicked", "panic", fmt.Sprint(raised))
		}
	}()
	o.onUnsent(unsent)
}

// flush waits until what is queued now is sent or unsent.
func (o *outbox) flush(ctx context.Context) error {
	o.mu.Lock()
	newest := o.numbers
	o.mu.Unlock()
	return o.await(ctx, func() bool { return len(o.queue) == 0 || o.queue[0].number > newest })
}

// await waits for a condition of what the lock protects.
func (o *outbox) await(ctx context.Context, met func() bool) error {
	for {
		o.mu.Lock()
		reached, changed := met(), o.changed
		o.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("keyturn: %w", ctx.Err())
		}
	}
}

// close takes no more records, goes on sending for a while, and gives back what is left.
func (o *outbox) close() []Unsent {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), o.closeTimeout)
	defer cancel()
	_ = o.await(ctx, func() bool { return len(o.queue) == 0 && o.expected == 0 }) // else it gives up
	o.mu.Lock()
	o.over = true
	o.mu.Unlock()
	o.stop()
	_ = o.await(context.Background(), func() bool { return !o.sending }) // it ends at once
	var left []Unsent
	for _, each := range o.queue { // nobody else takes out or puts in any more
		left = append(left, Unsent{Record: each.record, Err: given(each.err, ErrClosed)})
		o.report(left[len(left)-1])
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.queue = nil
	o.announce()
	return left
}
