package keyturn_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

const (
	secretText = "sk-live-0123456789abcdefghijklmnopqrstuvwxyz"
	handleText = "kth1_handle0123456789abcdefghijklmnopqrstuvwxyz"
	ticketText = "ktt1_ticket0123456789abcdefghijklmnopqrstuvwxyz"
)

// A sidecar is a gRPC server that answers what a test tells it to, and keeps what it was asked. Without a script it gives
// tickets and takes records.
type sidecar struct {
	keyturnv1.UnimplementedRoutingServiceServer
	onDecide      func(context.Context, *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error)
	onRecord      func(context.Context, *keyturnv1.RecordRequest) (*keyturnv1.RecordResponse, error)
	onRedeem      func(context.Context, *keyturnv1.RedeemRequest) (*keyturnv1.RedeemResponse, error)
	onExplain     func(context.Context, *keyturnv1.ExplainRequest) (*keyturnv1.ExplainResponse, error)
	onBatchDecide func(context.Context, *keyturnv1.BatchDecideRequest) (*keyturnv1.BatchDecideResponse, error)
	onBatchRecord func(context.Context, *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error)

	target string
	mu     sync.Mutex
	asked  []any
	heard  []metadata.MD
}

// serve starts a sidecar on a Unix socket of its own.
func serve(t *testing.T, s *sidecar) *sidecar {
	t.Helper()
	directory, err := os.MkdirTemp("", "kt") // short: the path of a socket has at most 107 bytes
	require(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	path := filepath.Join(directory, "k.sock")
	stop := listen(t, s, "unix", path)
	t.Cleanup(stop)
	s.target = "unix:" + path
	return s
}

// listen serves at an address until what it returns is called.
func listen(t *testing.T, s *sidecar, network, address string, options ...grpc.ServerOption) func() {
	t.Helper()
	listener, err := net.Listen(network, address)
	require(t, err)
	if network == "tcp" {
		s.target = listener.Addr().String()
	}
	server := grpc.NewServer(options...)
	keyturnv1.RegisterRoutingServiceServer(server, s)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	return func() {
		server.Stop()
		<-served
	}
}

// open makes a client of the sidecar, with delays that keep a test short.
func (s *sidecar) open(t *testing.T, options keyturn.Options) *keyturn.Client {
	t.Helper()
	options.Target = s.target
	if options.Retries.FirstDelay == 0 {
		options.Retries.FirstDelay = time.Millisecond
	}
	if options.Timeout == 0 {
		options.Timeout = 20 * time.Second // no test is about the default
	}
	client, err := keyturn.NewClient(options)
	require(t, err)
	t.Cleanup(func() { client.Close() })
	return client
}

func (s *sidecar) note(ctx context.Context, request any) {
	heard, _ := metadata.FromIncomingContext(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, request)
	s.heard = append(s.heard, heard)
}

// requests are those of one kind so far, in order.
func requests[Request any](s *sidecar) []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []Request
	for _, each := range s.asked {
		if request, ok := each.(Request); ok {
			found = append(found, request)
		}
	}
	return found
}

// records are those that came one by one or in batches.
func (s *sidecar) records() []*keyturnv1.RecordRequest {
	found := requests[*keyturnv1.RecordRequest](s)
	for _, batch := range requests[*keyturnv1.BatchRecordRequest](s) {
		found = append(found, batch.GetRequests()...)
	}
	return found
}

func answer[Request, Response any](ctx context.Context, s *sidecar, request *Request, script func(context.Context, *Request) (*Response, error),
	otherwise func() *Response,
) (*Response, error) {
	s.note(ctx, request)
	if script != nil {
		return script(ctx, request)
	}
	return otherwise(), nil
}

func (s *sidecar) Decide(ctx context.Context, r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
	return answer(ctx, s, r, s.onDecide, ticketAnswer)
}

func (s *sidecar) Record(ctx context.Context, r *keyturnv1.RecordRequest) (*keyturnv1.RecordResponse, error) {
	return answer(ctx, s, r, s.onRecord, recordAnswer)
}

func (s *sidecar) Redeem(ctx context.Context, r *keyturnv1.RedeemRequest) (*keyturnv1.RedeemResponse, error) {
	return answer(ctx, s, r, s.onRedeem, func() *keyturnv1.RedeemResponse {
		return &keyturnv1.RedeemResponse{Secret: secretText}
	})
}

func (s *sidecar) Explain(ctx context.Context, r *keyturnv1.ExplainRequest) (*keyturnv1.ExplainResponse, error) {
	return answer(ctx, s, r, s.onExplain, func() *keyturnv1.ExplainResponse {
		return &keyturnv1.ExplainResponse{
			Decision: ticketAnswer(), Steps: []*keyturnv1.ExplainStep{{Check: "tier", Result: "eligible", Detail: "premium"}},
		}
	})
}

func (s *sidecar) BatchDecide(ctx context.Context, r *keyturnv1.BatchDecideRequest) (*keyturnv1.BatchDecideResponse, error) {
	return answer(ctx, s, r, s.onBatchDecide, func() *keyturnv1.BatchDecideResponse {
		response := &keyturnv1.BatchDecideResponse{}
		for range r.GetRequests() {
			response.Results = append(response.Results, &keyturnv1.BatchDecideResult{
				Result: &keyturnv1.BatchDecideResult_Response{Response: ticketAnswer()},
			})
		}
		return response
	})
}

func (s *sidecar) BatchRecord(ctx context.Context, r *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
	return answer(ctx, s, r, s.onBatchRecord, func() *keyturnv1.BatchRecordResponse { return allRecorded(r) })
}

func allRecorded(r *keyturnv1.BatchRecordRequest) *keyturnv1.BatchRecordResponse {
	response := &keyturnv1.BatchRecordResponse{}
	for range r.GetRequests() {
		response.Results = append(response.Results, &keyturnv1.BatchRecordResult{
			Result: &keyturnv1.BatchRecordResult_Response{Response: recordAnswer()},
		})
	}
	return response
}

func ticketAnswer() *keyturnv1.DecideResponse {
	return &keyturnv1.DecideResponse{
		DecisionId: "d1", Mode: keyturnv1.Mode_MODE_CREDIT_FIRST, Reason: keyturnv1.Reason_REASON_CREDIT_FIRST_CREDITS,
		Route: &keyturnv1.DecideResponse_Ticket{Ticket: &keyturnv1.CreditTicket{
			Ticket: ticketText, HoldMicros: 50_000, AvailableMicros: 950_000,
		}},
	}
}

func keyAnswer() *keyturnv1.DecideResponse {
	return &keyturnv1.DecideResponse{
		DecisionId: "d2", Mode: keyturnv1.Mode_MODE_BYOK_FIRST, Reason: keyturnv1.Reason_REASON_BYOK_FIRST_OWN_KEY,
		Route: &keyturnv1.DecideResponse_Key{Key: &keyturnv1.KeyHandle{
			Handle: handleText, KeyId: "k1", Provider: "openai", Hint: "wxyz", Secret: secretText,
			Auth: &keyturnv1.KeyHandle_Auth{Header: "Authorization", Prefix: "Bearer "}, BaseUrl: "https://api.openai.com/v1",
		}},
	}
}

func denialAnswer() *keyturnv1.DecideResponse {
	return &keyturnv1.DecideResponse{
		DecisionId: "d3", Reason: keyturnv1.Reason_REASON_DENIED, Message: "Only credits may pay.",
		Route: &keyturnv1.DecideResponse_Denial{Denial: &keyturnv1.Denial{
			Reason: keyturnv1.DenialReason_DENIAL_REASON_RATE_LIMITED, Retryable: true,
			RetryAfter: durationpb.New(1500 * time.Millisecond), Suggestion: "Wait.",
		}},
	}
}

func recordAnswer() *keyturnv1.RecordResponse {
	return &keyturnv1.RecordResponse{
		RecordId: "d1", ChargedMicros: 20_000, ReleasedMicros: 30_000, BalanceMicros: new(int64(980_000)),
		CostSource: keyturnv1.CostSource_COST_SOURCE_PRICED, Durability: keyturnv1.Durability_DURABILITY_DATABASE,
	}
}

// fault is a status as the sidecar makes it, with an ErrorInfo.
func fault(code codes.Code, reason string, details ...protoadapt.MessageV1) error {
	made, err := status.New(code, "It is out of order.").WithDetails(append([]protoadapt.MessageV1{
		&errdetails.ErrorInfo{Reason: reason, Domain: "keyturn", Metadata: map[string]string{"error_id": "e1"}},
	}, details...)...)
	if err != nil {
		return err
	}
	return made.Err()
}

// scripted answers with one error after the other (nil: the usual answer), and then with the usual answer.
func scripted[Request, Response any](usual func() *Response, failures ...error) func(context.Context, *Request) (*Response, error) {
	var mu sync.Mutex
	return func(context.Context, *Request) (*Response, error) {
		mu.Lock()
		defer mu.Unlock()
		if len(failures) == 0 {
			return usual(), nil
		}
		failure := failures[0]
		failures = failures[1:]
		if failure != nil {
			return nil, failure
		}
		return usual(), nil
	}
}

func request() keyturn.DecideRequest { return keyturn.DecideRequest{UserID: "u1", Provider: "openai"} }

func ticketRecord() keyturn.RecordRequest {
	return keyturn.RecordRequest{Settles: keyturn.NewSealedTicket(ticketText), Outcome: keyturn.OutcomeSuccess}
}

func require(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// eventually waits for what another goroutine does.
func eventually(t *testing.T, what string, met func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !met(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came: %s", what)
		}
	}
}
