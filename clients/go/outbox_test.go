package keyturn_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

func numbered(number int) keyturn.RecordRequest {
	return keyturn.RecordRequest{
		Settles: keyturn.NewSealedTicket(fmt.Sprintf("ticket-%d", number)), Outcome: keyturn.OutcomeSuccess,
	}
}

func tickets(records []*keyturnv1.RecordRequest) string {
	var all []string
	for _, each := range records {
		all = append(all, strings.TrimPrefix(each.GetCreditTicket(), "ticket-"))
	}
	return strings.Join(all, " ")
}

// unsents collects what OnUnsent is called with.
type unsents struct {
	mu  sync.Mutex
	all []keyturn.Unsent
}

func (u *unsents) add(unsent keyturn.Unsent) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all = append(u.all, unsent)
}

func (u *unsents) get() []keyturn.Unsent {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]keyturn.Unsent(nil), u.all...)
}

// patient is a client that never gives up on its own in a test.
func patient(t *testing.T, s *sidecar, options keyturn.Options) (*keyturn.Client, *unsents) {
	t.Helper()
	got := &unsents{}
	options.CloseTimeout = 20 * time.Second
	options.OnUnsent = got.add
	return s.open(t, options), got
}

func TestWhatIsQueuedGoesInBatchesInOrder(t *testing.T) {
	came, release := make(chan struct{}, 10), make(chan struct{})
	s := serve(t, &sidecar{onBatchRecord: func(_ context.Context, r *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		came <- struct{}{}
		<-release
		return allRecorded(r), nil
	}})
	client, unsent := patient(t, s, keyturn.Options{})
	require(t, client.RecordLater(numbered(0)))
	<-came
	for i := range 150 {
		require(t, client.RecordLater(numbered(i+1)))
	}
	close(release)
	require(t, client.Flush(t.Context()))
	batches := requests[*keyturnv1.BatchRecordRequest](s)
	equal(t, "batches", len(batches), 3)
	for i, want := range []int{1, 100, 50} {
		equal(t, "records in a batch", len(batches[i].GetRequests()), want)
	}
	next := 0
	for _, record := range s.records() {
		equal(t, "the order", record.GetCreditTicket(), fmt.Sprintf("ticket-%d", next))
		next++
	}
	equal(t, "unsent", len(unsent.get()), 0)
}

func TestABatchThatFailsInPassingIsTriedAgainWithoutEnd(t *testing.T) {
	for _, code := range []codes.Code{codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted} {
		failure := fault(code, "X")
		s := serve(t, &sidecar{})
		usual := func() *keyturnv1.BatchRecordResponse {
			return allRecorded(&keyturnv1.BatchRecordRequest{Requests: make([]*keyturnv1.RecordRequest, 1)})
		}
		s.onBatchRecord = scripted[keyturnv1.BatchRecordRequest](usual, failure, failure, failure, failure, failure, failure, failure)
		client, unsent := patient(t, s, keyturn.Options{Retries: keyturn.Retries{Attempts: 2, MaxDelay: 5 * time.Millisecond}})
		require(t, client.RecordLater(numbered(1)))
		require(t, client.Flush(t.Context()))
		equal(t, code.String()+": attempts", len(s.records()), 8)
		equal(t, code.String()+": unsent", len(unsent.get()), 0)
	}
}

// perItem answers a batch by what is to become of each ticket the first time it is seen.
func perItem(t *testing.T, failures map[string]error) func(context.Context, *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
	var mu sync.Mutex
	return func(_ context.Context, r *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		mu.Lock()
		defer mu.Unlock()
		response := allRecorded(r)
		for i, each := range r.GetRequests() {
			failure, ok := failures[each.GetCreditTicket()]
			if !ok {
				continue
			}
			delete(failures, each.GetCreditTicket())
			info, err := anypb.New(&errdetails.ErrorInfo{Reason: "X"})
			require(t, err)
			response.Results[i] = &keyturnv1.BatchRecordResult{Result: &keyturnv1.BatchRecordResult_Status{Status: &keyturnv1.Status{
				Code: int32(status.Code(failure)), Message: "failed", Details: []*anypb.Any{info},
			}}}
		}
		return response, nil
	}
}

func TestARecordThatFailsByItselfConcernsNoOther(t *testing.T) {
	s := serve(t, &sidecar{})
	s.onBatchRecord = perItem(t, map[string]error{
		"ticket-1": fault(codes.Unavailable, "ROW_LOCKED"), "ticket-2": fault(codes.AlreadyExists, "RECORD_CONFLICT"),
	})
	client, unsent := patient(t, s, keyturn.Options{})
	for i := range 4 {
		require(t, client.RecordLater(numbered(i)))
	}
	require(t, client.Flush(t.Context()))
	sent := map[string]int{}
	for _, ticket := range strings.Fields(tickets(s.records())) {
		sent[ticket]++
	}
	for ticket, want := range map[string]int{"0": 1, "1": 2, "2": 1, "3": 1} {
		equal(t, "times that ticket "+ticket+" was sent", sent[ticket], want)
	}
	got := unsent.get()
	equal(t, "unsent", len(got), 1)
	equal(t, "which", got[0].Record.Settles.(keyturn.SealedTicket).Text(), "ticket-2")
	equal(t, "why", errors.Is(got[0].Err, keyturn.ErrAlreadyExists), true)
}

func TestABatchThatIsRefusedIsUnsent(t *testing.T) {
	s := serve(t, &sidecar{onBatchRecord: func(context.Context, *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		return nil, fault(codes.PermissionDenied, "PERMISSION_DENIED")
	}})
	client, unsent := patient(t, s, keyturn.Options{})
	require(t, client.RecordLater(numbered(1)))
	require(t, client.Flush(t.Context()))
	got := unsent.get()
	equal(t, "unsent", len(got), 1)
	equal(t, "why", errors.Is(got[0].Err, keyturn.ErrPermissionDenied), true)
	equal(t, "left", len(client.Close()), 0)
}

func TestAFullQueueRefusesAndACallsEndReportsIt(t *testing.T) {
	came, release := make(chan struct{}, 10), make(chan struct{})
	s := serve(t, &sidecar{onBatchRecord: func(_ context.Context, r *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		came <- struct{}{}
		<-release
		return allRecorded(r), nil
	}})
	client, unsent := patient(t, s, keyturn.Options{QueueSize: 2})
	require(t, client.RecordLater(numbered(0)))
	<-came
	require(t, client.RecordLater(numbered(1)))
	equal(t, "full", errors.Is(client.RecordLater(numbered(2)), keyturn.ErrQueueFull), true)
	equal(t, "unsent so far", len(unsent.get()), 0)
	begin(t, client).Close()
	got := unsent.get()
	equal(t, "unsent", len(got), 1)
	equal(t, "why", errors.Is(got[0].Err, keyturn.ErrQueueFull), true)
	equal(t, "outcome", got[0].Record.Outcome, keyturn.OutcomeNeverSent)
	close(release)
	require(t, client.Flush(t.Context()))
	require(t, client.RecordLater(numbered(3)))
}

func TestCloseGivesUpAndGivesBackWhatIsLeft(t *testing.T) {
	s := serve(t, &sidecar{onBatchRecord: func(ctx context.Context, _ *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		return nil, fault(codes.Unavailable, "STORE_UNAVAILABLE")
	}})
	got := &unsents{}
	client := s.open(t, keyturn.Options{CloseTimeout: 50 * time.Millisecond, OnUnsent: got.add})
	for i := range 3 {
		require(t, client.RecordLater(numbered(i)))
	}
	eventually(t, "a second attempt", func() bool { return len(requests[*keyturnv1.BatchRecordRequest](s)) > 1 })
	flushed := make(chan error)
	go func() { flushed <- client.Flush(context.Background()) }()
	left := client.Close()
	if err := <-flushed; err != nil && !errors.Is(err, keyturn.ErrClosed) {
		t.Error(err)
	}
	equal(t, "left", len(left), 3)
	for i, each := range left {
		equal(t, "which", each.Record.Settles.(keyturn.SealedTicket).Text(), fmt.Sprintf("ticket-%d", i))
		if !errors.Is(each.Err, keyturn.ErrUnavailable) && !errors.Is(each.Err, keyturn.ErrClosed) {
			t.Errorf("its error is %v", each.Err)
		}
	}
	equal(t, "the first one's error", errors.Is(left[0].Err, keyturn.ErrUnavailable), true)
	equal(t, "reported", len(got.get()), 3)
}

func TestCloseGivesUpOnASidecarThatSaysNothing(t *testing.T) {
	came := make(chan struct{})
	s := serve(t, &sidecar{onBatchRecord: func(ctx context.Context, _ *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		close(came)
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}})
	got := &unsents{}
	client := s.open(t, keyturn.Options{CloseTimeout: 10 * time.Millisecond, OnUnsent: got.add})
	require(t, client.RecordLater(numbered(1)))
	<-came
	left := client.Close()
	equal(t, "left", len(left), 1)
	equal(t, "reported", len(got.get()), 1)
	equal(t, "why", errors.Is(left[0].Err, keyturn.ErrClosed), true)
}

func TestACallThatEndsAfterTheClientIsReported(t *testing.T) {
	client, unsent := patient(t, serve(t, &sidecar{}), keyturn.Options{})
	call := begin(t, client)
	client.Close()
	call.Close()
	got := unsent.get()
	equal(t, "unsent", len(got), 1)
	equal(t, "why", errors.Is(got[0].Err, keyturn.ErrClosed), true)
}

func TestFlushWaitsForWhatWasQueuedBeforeIt(t *testing.T) {
	came, release := make(chan struct{}, 10), make(chan struct{})
	s := serve(t, &sidecar{onBatchRecord: func(_ context.Context, r *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
		came <- struct{}{}
		<-release
		return allRecorded(r), nil
	}})
	client, _ := patient(t, s, keyturn.Options{})
	require(t, client.RecordLater(numbered(0)))
	<-came
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	equal(t, "not yet", errors.Is(client.Flush(short), context.DeadlineExceeded), true)
	close(release)
	require(t, client.Flush(t.Context()))
	equal(t, "records", tickets(s.records()), "0")
}

func TestACallbackThatPanicsIsLoggedAndStopsNothing(t *testing.T) {
	var logged bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&logged, nil)))
	defer slog.SetDefault(before)
	s := serve(t, &sidecar{})
	s.onBatchRecord = perItem(t, map[string]error{"ticket-0": fault(codes.AlreadyExists, "RECORD_CONFLICT")})
	client := s.open(t, keyturn.Options{
		CloseTimeout: 20 * time.Second, OnUnsent: func(keyturn.Unsent) { panic("at the callback's own") },
	})
	require(t, client.RecordLater(numbered(0)))
	require(t, client.RecordLater(numbered(1)))
	equal(t, "left", len(client.Close()), 0)
	equal(t, "records", tickets(s.records()), "0 1")
	if !strings.Contains(logged.String(), "at the callback's own") {
		t.Errorf("logged %q", logged.String())
	}
}

func TestRecordsThatAreLargeGoInSmallerBatches(t *testing.T) {
	s := serve(t, &sidecar{})
	client, _ := patient(t, s, keyturn.Options{})
	for range 40 {
		record := numbered(1)
		record.Model = strings.Repeat("m", 60_000) // refused by the sidecar, but one by one
		require(t, client.RecordLater(record))
	}
	require(t, client.Flush(t.Context()))
	equal(t, "records", len(s.records()), 40)
	for _, batch := range requests[*keyturnv1.BatchRecordRequest](s) {
		if len(batch.GetRequests()) > 8 {
			t.Errorf("a batch of %d", len(batch.GetRequests()))
		}
	}
}
